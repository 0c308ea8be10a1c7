# find the compilers before anything needs them, so that a machine without one gets one sentence

if (NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release)
endif()

set(no_compiler " equip: error: No working C++17 compiler was found; install one (Debian: apt install g++; macOS: xcode-select --install) and run the command again.")

include(CheckLanguage)
foreach (language C CXX)
    check_language(${language})
    if (NOT CMAKE_${language}_COMPILER)
        message(FATAL_ERROR "${no_compiler}")
    endif()
    enable_language(${language})
endforeach()
if (NOT "cxx_std_17" IN_LIST CMAKE_CXX_COMPILE_FEATURES)
    message(FATAL_ERROR "${no_compiler}")
endif()

# a launcher that is the same in every build environment; paths relative to the build folder let two builds share results
find_program(EQUIP_CCACHE ccache)
find_program(EQUIP_ENV env)
if (EQUIP_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
    set(launcher "${EQUIP_CCACHE}")
    if (EQUIP_ENV AND NOT WIN32)
        set(launcher "${EQUIP_ENV}" "CCACHE_BASEDIR=${CMAKE_BINARY_DIR}" "${EQUIP_CCACHE}")
    endif()
    foreach (language C CXX CUDA OBJC)
        set(CMAKE_${language}_COMPILER_LAUNCHER "${launcher}")
    endforeach()
endif()
