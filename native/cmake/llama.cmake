# add upstream's targets: ggml*, llama, and llama-common as a static library that only libequip links
# normal variables, not cached ones: they decide for upstream's options and follow this file at each configure

set(BUILD_SHARED_LIBS               ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY  "${CMAKE_BINARY_DIR}/bin")
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY  "${CMAKE_BINARY_DIR}/bin")

set(LLAMA_BUILD_COMMON   ${EQUIP_UPSTREAM_TESTS})
set(LLAMA_BUILD_TESTS    ${EQUIP_UPSTREAM_TESTS})
set(LLAMA_BUILD_TOOLS    ${EQUIP_UPSTREAM_TESTS})
set(LLAMA_BUILD_SERVER   ${EQUIP_UPSTREAM_TESTS})
set(LLAMA_BUILD_EXAMPLES OFF)
set(LLAMA_BUILD_APP      OFF)
set(LLAMA_BUILD_UI       OFF)
set(LLAMA_BUILD_MTMD     OFF)
set(LLAMA_USE_PREBUILT_UI OFF)
set(LLAMA_TOOLS_INSTALL  OFF)
set(LLAMA_TESTS_INSTALL  OFF)
set(LLAMA_OPENSSL        OFF)
set(LLAMA_SUBPROCESS     OFF)

# the pin names the commit; without this, upstream asks git and gets the answer of whatever repository lies around us
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT "${EQUIP_LLAMA_CPP_COMMIT}")
set(GIT_EXE        "" CACHE INTERNAL "")
set(GIT_EXECUTABLE "" CACHE INTERNAL "")
set(CMAKE_DISABLE_FIND_PACKAGE_Git TRUE)

set(GGML_CCACHE OFF) # compiler.cmake has set the launcher
if (APPLE)
    set(GGML_METAL_EMBED_LIBRARY ON)
endif()
if (EQUIP_PORTABLE)
    set(GGML_NATIVE           OFF)
    set(GGML_BACKEND_DL       ON)
    set(GGML_CPU_ALL_VARIANTS ON)
endif()

# libraries find each other beside themselves; one plain file each, since a wheel cannot hold links
if (APPLE)
    set(CMAKE_INSTALL_RPATH "@loader_path")
elseif (NOT WIN32)
    set(CMAKE_INSTALL_RPATH "$ORIGIN")
endif()
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)

message(STATUS "equip: configure: llama.cpp ${EQUIP_LLAMA_CPP_COMMIT}")
set(CMAKE_MESSAGE_LOG_LEVEL WARNING)
add_subdirectory("${EQUIP_LLAMA_CPP_DIR}" upstream EXCLUDE_FROM_ALL)

if (NOT EQUIP_PRISTINE)
    file(GLOB llama_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/src/llama-*.cpp")
    target_sources(llama PRIVATE ${llama_sources})
    target_include_directories(llama PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/src" "${CMAKE_CURRENT_SOURCE_DIR}/ggml")
    set_source_files_properties(${llama_sources} TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
endif()

# every library target of upstream that a program loads
function(equip_collect_libraries folder result)
    get_property(targets DIRECTORY "${folder}" PROPERTY BUILDSYSTEM_TARGETS)
    set(found)
    foreach (target ${targets})
        get_target_property(type ${target} TYPE)
        if (target MATCHES "^(llama|ggml|ggml-.*)$" AND type MATCHES "^(SHARED|MODULE)_LIBRARY$")
            list(APPEND found ${target})
        endif()
    endforeach()
    get_property(subfolders DIRECTORY "${folder}" PROPERTY SUBDIRECTORIES)
    foreach (subfolder ${subfolders})
        equip_collect_libraries("${subfolder}" below)
        list(APPEND found ${below})
    endforeach()
    set(${result} ${found} PARENT_SCOPE)
endfunction()

equip_collect_libraries("${EQUIP_LLAMA_CPP_DIR}" EQUIP_LIBRARIES)
foreach (target ${EQUIP_LIBRARIES})
    set_property(TARGET ${target} PROPERTY VERSION)
    set_property(TARGET ${target} PROPERTY SOVERSION)
    set_property(TARGET ${target} PROPERTY PUBLIC_HEADER)
    if (target MATCHES "cuda|hip|musa|sycl|vulkan")
        set_property(TARGET ${target} PROPERTY INSTALL_RPATH_USE_LINK_PATH ON) # a toolkit outside the loader's path
    endif()
endforeach()

# the CPU backend is one library, or one per group of instruction sets
set(cpu_targets ${EQUIP_LIBRARIES})
list(FILTER cpu_targets INCLUDE REGEX "^ggml-cpu(-.*)?$")

unset(CMAKE_MESSAGE_LOG_LEVEL)
equip_use_what_works(${cpu_targets})

if (NOT EQUIP_PRISTINE)
    set(own_dir "${CMAKE_CURRENT_SOURCE_DIR}/ggml")
    file(GLOB cpu_sources CONFIGURE_DEPENDS "${own_dir}/*.cpp")
    list(REMOVE_ITEM cpu_sources "${own_dir}/ggml-cpu-probe.cpp")
    foreach (target ${cpu_targets})
        target_sources(${target} PRIVATE ${cpu_sources})
        foreach (part ${target} ${target}-feats)
            if (TARGET ${part})
                target_include_directories(${part} PRIVATE "${own_dir}")
            endif()
        endforeach()
    endforeach()
    # what says whether code for a processor can run must itself run on all of them
    target_sources(ggml-base PRIVATE "${own_dir}/ggml-cpu-probe.cpp")
    foreach (target ggml-base ggml)
        target_include_directories(${target} PRIVATE "${own_dir}")
    endforeach()
endif()

add_custom_target(equip-libraries DEPENDS ${EQUIP_LIBRARIES})

if (NOT EQUIP_PRISTINE AND NOT EQUIP_UPSTREAM_TESTS)
    foreach (name LLAMA_VERSION LLAMA_VERSION_BASE LLAMA_VERSION_MAJOR BUILD_COMPILER BUILD_TARGET)
        get_directory_property(${name} DIRECTORY "${EQUIP_LLAMA_CPP_DIR}" DEFINITION ${name})
    endforeach()
    set(BUILD_SHARED_LIBS           OFF)
    set(CMAKE_C_VISIBILITY_PRESET   hidden)
    set(CMAKE_CXX_VISIBILITY_PRESET hidden)
    set(CMAKE_MESSAGE_LOG_LEVEL     ERROR) # it warns that there is no git, which is meant
    add_subdirectory("${EQUIP_LLAMA_CPP_DIR}/vendor/cpp-httplib" common/cpp-httplib EXCLUDE_FROM_ALL)
    add_subdirectory("${EQUIP_LLAMA_CPP_DIR}/common"             common             EXCLUDE_FROM_ALL)
    set(BUILD_SHARED_LIBS ON)
endif()
unset(CMAKE_MESSAGE_LOG_LEVEL)

# our part of upstream's llama-common, in whichever folder it was added
if (NOT EQUIP_PRISTINE AND TARGET llama-common)
    file(GLOB common_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/common/*.cpp")
    target_sources(llama-common PRIVATE ${common_sources})
    target_include_directories(llama-common PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}/common")
endif()
