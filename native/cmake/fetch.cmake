# put llama.cpp, patched unless EQUIP_PRISTINE, into ${EQUIP_LLAMA_CPP_DIR}

set(EQUIP_LLAMA_CPP_DIR "${CMAKE_BINARY_DIR}/llama.cpp")
set(patches_dir "${CMAKE_CURRENT_SOURCE_DIR}/../patches")

find_package(Python3 COMPONENTS Interpreter)
if (NOT Python3_Interpreter_FOUND)
    message(FATAL_ERROR " equip: error: No Python 3 was found; install Python 3.10 or newer, or set Python3_EXECUTABLE.")
endif()

set(fetch_args --out "${EQUIP_LLAMA_CPP_DIR}" --patches "${patches_dir}")
if (EQUIP_PRISTINE)
    list(APPEND fetch_args --no-patches)
endif()

execute_process(
    COMMAND "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/upstream.py" ${fetch_args}
    RESULT_VARIABLE fetch_result
    ERROR_VARIABLE  fetch_error)
if (NOT fetch_result EQUAL 0)
    string(STRIP "${fetch_error}" fetch_error)
    message(FATAL_ERROR " ${fetch_error}") # the leading space keeps CMake from wrapping the sentence
endif()

file(GLOB patch_files CONFIGURE_DEPENDS "${patches_dir}/*.patch")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    ${patch_files} "${CMAKE_CURRENT_LIST_DIR}/upstream.py" "${CMAKE_CURRENT_LIST_DIR}/pin.json")

file(READ "${CMAKE_CURRENT_LIST_DIR}/pin.json" pin)
string(JSON EQUIP_LLAMA_CPP_COMMIT  GET "${pin}" commit)
string(JSON EQUIP_LLAMA_CPP_PACKAGE GET "${pin}" package)
string(JSON EQUIP_LLAMA_CPP_RELEASE GET "${pin}" version)
