#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <vector>

// what a step moves between the host and a device, of what lies beside its keys
struct llama_kv_traffic {
    int64_t n_reads  = 0; // each waits for what is computed before it
    int64_t n_writes = 0;
};

// a backend of the policy's own on this device, with n threads where it has any; nullptr if it cannot be made
ggml_backend_ptr llama_kv_backend_init(ggml_backend_dev_t dev, int n_threads);

// buffers of this type are the CPU's own memory
bool llama_kv_is_cpu(ggml_backend_buffer_type_t buft);

// a switch of tests and benchmarks: LLAMA_KV_SCORES or LLAMA_KV_SINKS=graph, in host memory too as on a device, by operations of the model's own
//   graph, or by the two nodes of ggml-kv-score.h with LLAMA_KV_SCORES=node; LLAMA_KV_CHOICE=host, victims by the host where devices would choose
bool llama_kv_env_is(const char * variable, const char * value);

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

// one such graph, from its first node to its result
class llama_kv_graph {
public:
    // room for n nodes, views included
    explicit llama_kv_graph(size_t n_nodes);

    ggml_context * get_ctx() const { return ctx.get(); }
    ggml_cgraph  * get()     const { return gf; }

    // a vector that is set before the graph is computed
    ggml_tensor * input(const std::vector<int32_t> & data);
    ggml_tensor * input(const std::vector<int64_t> & data);

    void expand(ggml_tensor * node);

    // false if it does not fit into memory, or fails
    bool compute(llama_kv_backends & backends, ggml_backend_t backend);

private:
    ggml_tensor * input(ggml_type type, size_t n, const void * data, size_t size);

    ggml_context_ptr ctx;
    ggml_cgraph    * gf;

    struct value { ggml_tensor * t; std::vector<uint8_t> data; };

    std::vector<value> values;
};
