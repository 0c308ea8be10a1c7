# a build for this processor (GGML_NATIVE) takes the instruction sets that work: each one that is announced is tried
#
# sets EQUIP_CPU_SETS (what works) and EQUIP_CPU_LEFT_OUT (what is announced and does not); both are empty where nothing
# can be tried: other architectures than x86, Windows, cross compilation, builds for other processors than this one

set(EQUIP_PROBE_DIR "${CMAKE_CURRENT_LIST_DIR}/../ggml")

# the flags of the targets are the sets by name: a build folder that moves to another processor compiles them again
function(equip_use_what_works) # targets
    # for each build: code for AMX is also compiled where it cannot run
    if (CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        foreach (target ${ARGN})
            target_include_directories(${target} SYSTEM BEFORE PRIVATE "${EQUIP_PROBE_DIR}/gcc")
        endforeach()
    endif()

    set(works)
    set(left_out)
    if (GGML_NATIVE AND NOT EQUIP_PORTABLE AND NOT CMAKE_CROSSCOMPILING AND NOT WIN32 AND NOT CMAKE_OSX_ARCHITECTURES)
        unset(EQUIP_PROBE_RUNS     CACHE) # at each configure
        unset(EQUIP_PROBE_COMPILES CACHE)
        try_run(EQUIP_PROBE_RUNS EQUIP_PROBE_COMPILES
            "${CMAKE_BINARY_DIR}/processor" "${EQUIP_PROBE_DIR}/ggml-cpu-probe.cpp"
            COMPILE_DEFINITIONS -DGGML_CPU_PROBE_MAIN
            CXX_STANDARD 17
            COMPILE_OUTPUT_VARIABLE said
            RUN_OUTPUT_VARIABLE     output)
        if (NOT EQUIP_PROBE_COMPILES OR NOT "${EQUIP_PROBE_RUNS}" STREQUAL 0)
            message(STATUS "equip: processor: its instruction sets could not be tried; what it announces is used")
            set(output "")
        endif()

        set(flags)
        string(REPLACE "\n" ";" lines "${output}")
        foreach (line ${lines})
            if (line MATCHES "^([^ ]+) (works|faults|needs) (.+)$")
                separate_arguments(words UNIX_COMMAND "${CMAKE_MATCH_3}")
                list(APPEND flags ${words})
                if (CMAKE_MATCH_2 STREQUAL "works")
                    list(APPEND works "${CMAKE_MATCH_1}")
                else()
                    list(APPEND left_out "${CMAKE_MATCH_1}")
                endif()
                if (CMAKE_MATCH_2 STREQUAL "faults")
                    list(APPEND faulting "${CMAKE_MATCH_1}")
                endif()
            endif()
        endforeach()

        # a compiler that does not know a set does not use it
        include(CheckCCompilerFlag)
        set(known)
        set(CMAKE_REQUIRED_QUIET ON)
        foreach (flag ${flags})
            string(MAKE_C_IDENTIFIER "EQUIP_COMPILER_KNOWS${flag}" answer)
            check_c_compiler_flag(${flag} ${answer})
            if (${answer})
                list(APPEND known ${flag})
            endif()
        endforeach()

        foreach (target ${ARGN})
            target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:C,CXX>:${known}>")
        endforeach()

        foreach (name ${faulting})
            string(TOUPPER "${name}" NAME)
            message(STATUS "equip: processor: ${NAME} is announced by this processor but does not work: left out")
        endforeach()
    endif()
    set(EQUIP_CPU_SETS     "${works}"    PARENT_SCOPE)
    set(EQUIP_CPU_LEFT_OUT "${left_out}" PARENT_SCOPE)
endfunction()
