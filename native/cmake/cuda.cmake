# our kernels in ggml-cuda; HIP and MUSA share its files, and get headers that say that there are none
#
#   EQUIP_GGML_DIR  native/ggml

function(equip_add_cuda_kernels)
    foreach (target ggml-cuda ggml-hip ggml-musa)
        if (TARGET ${target})
            target_include_directories(${target} PRIVATE "${EQUIP_GGML_DIR}" "${EQUIP_GGML_DIR}/cuda")
        endif()
    endforeach()
    if (TARGET ggml-cuda)
        file(GLOB sources CONFIGURE_DEPENDS "${EQUIP_GGML_DIR}/cuda/*.cu")
        target_sources(ggml-cuda PRIVATE ${sources})
        target_compile_definitions(ggml-cuda PRIVATE GGML_CUDA_KV_SCORE)
    endif()
endfunction()
