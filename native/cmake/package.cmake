# what goes into the wheel, below equip_cli/: lib/ (one plain file per library, and llama-server), include/equip.h, licenses/, models.txt
# whatever of another project is compiled in or copied has its licence in licenses/; tests/building/test_licences.py
# names them

# the licence of ggml's llamafile kernels stands at the head of their source alone
set(llamafile "${EQUIP_LLAMA_CPP_DIR}/ggml/src/ggml-cpu/llamafile/sgemm.cpp")
file(READ "${llamafile}" header LIMIT 2000)
string(REGEX MATCH "^(//[^\n]*\n)+" header "${header}")
string(REGEX REPLACE "(^|\n)// ?" "\\1" header "${header}")
if (NOT header MATCHES "Copyright.*Permission is hereby granted")
    message(FATAL_ERROR " equip: error: ${llamafile} does not begin with its licence; look for its new place and correct native/cmake/package.cmake.")
endif()
file(WRITE "${CMAKE_BINARY_DIR}/llamafile-license.txt" "${header}")

# those of the parts of llama-server that read images and sounds stand at the end of their headers
foreach (part stb/stb_image miniaudio/miniaudio)
    get_filename_component(name "${part}" DIRECTORY)
    set(header "${EQUIP_LLAMA_CPP_DIR}/vendor/${part}.h")
    file(SIZE "${header}" end)
    math(EXPR begin "${end} - 4000")
    file(READ "${header}" text OFFSET ${begin})
    string(REGEX MATCH "This software is available .*" text "${text}")
    string(REGEX REPLACE "\\*/[ \r\n]*$" "" text "${text}")
    if (NOT text MATCHES "Copyright.*Permission is hereby granted")
        message(FATAL_ERROR " equip: error: ${header} does not end with its licence; look for its new place and correct native/cmake/package.cmake.")
    endif()
    file(WRITE "${CMAKE_BINARY_DIR}/${name}-license.txt" "${text}")
endforeach()

# how these libraries were built; the tests build their reference in the same way
string(REPLACE "\\" "\\\\" cmake_args "$ENV{CMAKE_ARGS}")
string(REPLACE "\"" "\\\"" cmake_args "${cmake_args}")
list(LENGTH patch_files n_patches)
if (EQUIP_PORTABLE)
    set(portable true)
else()
    set(portable false)
endif()
foreach (name EQUIP_CPU_SETS EQUIP_CPU_LEFT_OUT)
    list(JOIN ${name} "\", \"" ${name}_JSON)
    if (${name})
        set(${name}_JSON "\"${${name}_JSON}\"")
    endif()
endforeach()
file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/bin/build.json" @ONLY CONTENT [[{
  "llama_cpp": "@EQUIP_LLAMA_CPP_COMMIT@",
  "llama_cpp_version": "@LLAMA_VERSION@",
  "source": "@EQUIP_LLAMA_CPP_PACKAGE@ @EQUIP_LLAMA_CPP_RELEASE@",
  "patches": @n_patches@,
  "compiler": "@CMAKE_CXX_COMPILER_ID@ @CMAKE_CXX_COMPILER_VERSION@",
  "cc": "@CMAKE_C_COMPILER@",
  "cxx": "@CMAKE_CXX_COMPILER@",
  "portable": @portable@,
  "instruction_sets": [@EQUIP_CPU_SETS_JSON@],
  "left_out": [@EQUIP_CPU_LEFT_OUT_JSON@],
  "cmake_args": "@cmake_args@"
}
]])

install(CODE "message(STATUS \"equip: install: libraries, header and licences\")" COMPONENT equip)
install(TARGETS equip ${EQUIP_LIBRARIES}
    RUNTIME DESTINATION equip_cli/lib COMPONENT equip
    LIBRARY DESTINATION equip_cli/lib COMPONENT equip)
if (EQUIP_SERVER)
    install(TARGETS llama-server RUNTIME DESTINATION equip_cli/lib COMPONENT equip)
endif()
install(FILES "${CMAKE_BINARY_DIR}/bin/build.json"         DESTINATION equip_cli/lib     COMPONENT equip)
install(FILES "${CMAKE_CURRENT_SOURCE_DIR}/include/equip.h" DESTINATION equip_cli/include COMPONENT equip)
install(FILES "${CMAKE_CURRENT_SOURCE_DIR}/../models.txt"   DESTINATION equip_cli         COMPONENT equip)

function(equip_install_license file name)
    install(FILES "${file}" DESTINATION equip_cli/licenses RENAME "${name}.txt" COMPONENT equip)
endfunction()

equip_install_license("${CMAKE_BINARY_DIR}/llamafile-license.txt"              llamafile)
equip_install_license("${EQUIP_LLAMA_CPP_DIR}/LICENSE"                         llama.cpp)
equip_install_license("${EQUIP_LLAMA_CPP_DIR}/licenses/LICENSE-jsonhpp"        nlohmann-json)
equip_install_license("${EQUIP_LLAMA_CPP_DIR}/vendor/cpp-httplib/LICENSE"      cpp-httplib)
equip_install_license("${CMAKE_BINARY_DIR}/stb-license.txt"                    stb)
equip_install_license("${CMAKE_BINARY_DIR}/miniaudio-license.txt"              miniaudio)
equip_install_license("${EQUIP_LLAMA_CPP_DIR}/vendor/hash/rotate-bits/LICENSE.md" rotate-bits)
equip_install_license("${EQUIP_LLAMA_CPP_DIR}/vendor/hash/xxhash/LICENSE"      xxhash)
equip_install_license("${CMAKE_CURRENT_LIST_DIR}/adapted-licenses.txt"         adapted)
