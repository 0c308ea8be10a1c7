#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <map>

// a backend of the policy's own on this device, with n threads where it has any; nullptr if it cannot be made
ggml_backend_ptr llama_kv_backend_init(ggml_backend_dev_t dev, int n_threads);

// graphs of our own beside the model's: on backends of our own, since the context's may carry the caller's abort callback,
//   and a copy or a rotation must not stop half way
class llama_kv_backends {
public:
    explicit llama_kv_backends(int n_threads) : n_threads(n_threads) {}

    // the backend for tensors in this buffer, made on first use; nullptr if it cannot be made
    ggml_backend_t get(ggml_backend_buffer_t buffer);

    // allocate what the graph holds beside the cache; the caller then sets the inputs
    bool alloc(ggml_backend_t backend, ggml_cgraph * gf);

    bool compute(ggml_backend_t backend, ggml_cgraph * gf);

private:
    struct entry {
        ggml_backend_ptr  backend;
        ggml_gallocr_ptr  galloc;
    };

    const int n_threads;

    std::map<ggml_backend_dev_t, entry> entries;
};
