#pragma once

#include "llama-kv-backend.h"
#include "llama-kv-layer.h"
#include "llama-kv-pool.h"
#include "llama-kv-rope.h"

#include <cstdint>
#include <vector>

class llama_kv_state_reader;
class llama_kv_state_writer;

// the keys of the protected tokens (sinks and pinned) under positions `cache` and `auto`: kept in f32 as first written, and
//   rewritten into the cache rotated by how far the query has moved away
// every rewrite starts from the original, so nothing drifts
//
// the first ones, the sinks, are rewritten before each step. Where the cache lies in host memory: one rotation of all layers
//   on the CPU, then a copy per layer. Elsewhere: one rotation of all layers of a device in the model's own graph, from originals
//   that lie there, and one write to all of their keys, or a write per layer where these do not lie at equal distances or are quantised;
//   nothing crosses the bus but one number (LLAMA_KV_SINKS=graph asks for it in host memory too, to compare them)
class llama_kv_sinks {
public:
    // most nodes of capture() and of build(), views included
    static constexpr uint32_t N_NODES_CAPTURE = 8;
    static constexpr uint32_t N_NODES_BUILD   = 16;

    llama_kv_sinks(llama_kv_rope & rope, llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers, const llama_kv_where & where, uint32_t n_seq);

    // room for the originals of n tokens per sequence; forgets what was there
    void resize(uint32_t n);

    uint32_t get_n() const { return n_tokens; }

    // the same, but what is there stays; graphs that were built before must not be computed again
    void grow(uint32_t n);

    // the nodes that keep keys [n_embd_k_gqa, n] as the originals of the tokens [rank, rank + n); none if the layer has no RoPE
    void capture(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * keys, uint32_t il, uint32_t seq, uint32_t rank) const;

    // the originals of one sequence become those of another
    void copy(uint32_t src, uint32_t dst);

    // saved states: the originals of the first n tokens of the sequence; is_check: nothing is changed, and there may be no room for them yet
    void state_write(llama_kv_state_writer & out, uint32_t seq, uint32_t n) const;
    void state_read (llama_kv_state_reader & in,  uint32_t seq, uint32_t n, bool is_check);

    // the keys of the tokens [0, n) of the sequence stand `delta` positions from their originals, in these rows, from this step on:
    //   written now, or announced to the graph; the caller has synchronised; false if the compute failed
    bool rewrite(uint32_t seq, int32_t delta, const uint32_t * rows, uint32_t n);

    // the same for [rank, rank + n), written now on the device of each layer: for hundreds of tokens
    bool rewrite_many(uint32_t seq, int32_t delta, uint32_t rank, const uint32_t * rows, uint32_t n);

    const llama_kv_traffic & get_traffic() const { return traffic; }

    // true if build() adds nodes for this layer
    bool in_graph(uint32_t il) const;
    bool any_in_graph() const;

    // the nodes that carry out what rewrite() has announced for n tokens of the sequence
    void build(ggml_context * ctx, ggml_cgraph * gf, uint32_t il, uint32_t seq, uint32_t n) const;

private:
    // layers on the same device with the same shape and the same rotation
    struct group {
        std::vector<size_t> idx; // into layers
        bool                host;
        ggml_backend_buffer_type_t buft;

        ggml_tensor * orig  = nullptr; // f32 [n_embd_k_gqa, n, n_layer, n_seq], without the Hadamard rotation of the cache
        ggml_tensor * delta = nullptr; // i32 [n_seq]          for build()
        ggml_tensor * slots = nullptr; // i64 [n, n_seq]       for build()

        llama_kv_keys keys; // of all its layers

        // what lies in them
        std::vector<int32_t>              delta_set; // [n_seq]
        std::vector<std::vector<int64_t>> slots_set; // [n_seq], empty: nothing yet

        mutable std::vector<ggml_tensor *> rotated; // [n_seq] of the graph that is built: [n_embd_k_gqa, n*n_layer]

        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
    };

    struct graph {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
        ggml_cgraph *           gf  = nullptr;
        ggml_tensor *           pos = nullptr; // i32 [1]
        ggml_tensor *           out = nullptr; // [n_embd_k_gqa, n*n_layer] in the cache's type
        uint32_t                n   = 0;
    };

    // the originals of the tokens [rank, rank + n) of a layer: f32 [n_embd_k_gqa, n]; nullptr if the layer has no RoPE
    ggml_tensor * original(ggml_context * ctx, uint32_t il, uint32_t seq, uint32_t rank, uint32_t n) const;

    graph & get_graph(size_t i_group, uint32_t seq, uint32_t n);

    const group * find(uint32_t il, size_t & i_layer) const;

    llama_kv_rope     & rope;
    llama_kv_backends & backends;

    const std::vector<llama_kv_layer> & layers;

    std::vector<group> groups;
    std::vector<graph> graphs; // [group*n_seq + seq]

    const llama_kv_where & where;

    const uint32_t n_seq;
    uint32_t n_tokens = 0;

    llama_kv_traffic traffic;

    ggml_backend_ptr backend; // CPU, one thread: a few rows, and no other thread is woken for them
};
