# The source package of ik_llama.cpp lacks this script, which its build runs.
file(WRITE "${CMAKE_CURRENT_SOURCE_DIR}/vendor/ik_llama.cpp/common/cmake/build-info-gen-cpp.cmake" [=[
set(BUILD_NUMBER 0)
configure_file(
    "${CMAKE_CURRENT_SOURCE_DIR}/common/build-info.cpp.in"
    "${CMAKE_CURRENT_SOURCE_DIR}/common/build-info.cpp"
)
]=])
