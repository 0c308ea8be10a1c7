#pragma once

#include "llama.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

// a backend of the policy's own on this device, with n threads where it has any; nullptr if it cannot be made
ggml_backend_ptr llama_kv_backend_init(ggml_backend_dev_t dev, int n_threads);

struct llama_cparams;
struct llama_hparams;
struct llama_model;

// the keys of the protected tokens under positions `cache`: kept in f32 as first written, and rewritten into the cache
//   rotated by how far the query has moved away (StreamingLLM's rule, stated for a cache that keeps true positions:
//   a sink's position is i + max(0, t - (C - 1)), C = visible tokens; arXiv 2309.17453, section 3.2)
// every rewrite starts from the original, so nothing drifts
class llama_kv_sinks {
public:
    struct layer {
        uint32_t il;
        ggml_tensor * k;                     // for its type and shape: [n_embd_k_gqa, n_slots, n_stream]
        std::vector<ggml_tensor *> k_stream; // [n_stream] of [n_embd_k_gqa, n_slots]
    };

    // rot: the Hadamard matrix that K is stored with (n_rot x n_rot), or empty
    llama_kv_sinks(const llama_model & model, const llama_hparams & hparams, std::vector<layer> layers, uint32_t n_stream,
            std::vector<float> rot);

    // the factors depend on the context's parameters
    void attach(const llama_cparams & cparams);

    // room for the originals of n tokens per stream; forgets what was there
    void resize(uint32_t n);

    uint32_t get_n() const { return n_tokens; }

    // where the original of token `rank` of a layer goes: f32 [n_embd_k_gqa, n], in host memory; nullptr if the layer has no RoPE
    ggml_tensor * original(ggml_context * ctx, int32_t il, uint32_t strm, uint32_t rank, uint32_t n) const;

    // the originals of one stream become those of another
    void copy(uint32_t src, uint32_t dst);

    // write the keys of the first n tokens, rotated by delta positions, into the given slots; the caller has synchronised
    // false if the compute failed
    bool rewrite(uint32_t strm, int32_t delta, const uint32_t * slots, uint32_t n);

private:
    // layers with the same shape and the same rotation share one graph
    struct group {
        std::vector<size_t> idx; // into layers
        int64_t n_embd_head;
        int64_t n_head_kv;
        int32_t n_rot;
        float   freq_base;
        float   freq_scale;
        ggml_tensor * factors;

        ggml_tensor * orig = nullptr; // f32 [n_embd_k_gqa, n, n_layer, n_stream]
    };

    struct graph {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
        ggml_cgraph *           gf  = nullptr;
        ggml_tensor *           pos = nullptr; // i32 [1]: all rows have the same delta, so the trigonometry is computed once
        ggml_tensor *           rot = nullptr; // f32 [n_rot, n_rot]
        ggml_tensor *           out = nullptr; // [n_embd_k_gqa, n*n_layer] in the cache's type
    };

    graph & get_graph(size_t i_group, uint32_t strm, uint32_t n);

    const llama_model   & model;
    const llama_hparams & hparams;
    const llama_cparams * cparams = nullptr;

    std::vector<layer> layers;
    std::vector<group> groups;

    const uint32_t n_stream;
    uint32_t n_tokens = 0;

    const std::vector<float> rot;

    ggml_backend_ptr        backend; // CPU, one thread: a few rows, and no other thread is woken for them
    ggml_context_ptr        ctx_orig;
    ggml_backend_buffer_ptr buf_orig;

    // [group*n_stream + stream], built for n_built tokens
    std::vector<graph>    graphs;
    std::vector<uint32_t> n_built;

    std::vector<uint8_t> staging;
};
