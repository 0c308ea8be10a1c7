#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

class  llama_kv_scores;
class  llama_kv_state_reader;
class  llama_kv_state_writer;
struct llama_kv_layer;

// how alike a token is to what a layer has seen before, and whether it is among the most alike ones: Token Filtering (arXiv 2512.07090)
// what of this is the paper's and what is ours: docs/policies.md
class llama_kv_filter_anchor {
public:
    static constexpr float  MEMORY = 0.9f;      // of the anchors, per token: the paper's
    static constexpr double STEP   = 0.2;       // of the threshold, in mean distances of the similarity from its mean
    static constexpr double FADE   = 1.0/64.0;  // of that mean and that distance, per token

    llama_kv_filter_anchor(uint32_t n_head, uint32_t n_embd_k, uint32_t n_embd_v) : n_head(n_head), k(n_head*n_embd_k), v(n_head*n_embd_v) {}

    // of a layer of the same shape
    void copy(const llama_kv_filter_anchor & other);

    void reset();

    // a token comes: k [n_head, n_embd_k], v [n_head, n_embd_v], each head's row contiguous, nb bytes after the one before it
    void add(const char * k_cur, size_t nb_k, const char * v_cur, size_t nb_v);

    // in [-1, 1], before it is added
    double similarity(const char * k_cur, size_t nb_k, const char * v_cur, size_t nb_v) const;

    // the similarity of a single token is known: true if it is among the `ratio` of them that are most alike; the threshold follows
    bool judge(double similarity, double ratio);

    uint32_t n_judged() const { return state.n_judged; }

    // saved states
    void state_write(llama_kv_state_writer & out) const;
    void state_read (llama_kv_state_reader & in, bool is_check);

private:
    const uint32_t n_head;

    std::vector<float> k; // [n_head, n_embd_k] running means
    std::vector<float> v; // [n_head, n_embd_v]

    struct {
        uint32_t n_added   = 0; // up to 1: whether there is an anchor
        uint32_t n_judged  = 0; // up to UINT32_MAX
        double   mean      = 0.0;
        double   distance  = 0.0;
        double   threshold = 0.0;
    } state;
};

// filter=RATIO beside a policy at scope layer or head: single tokens at a full cache that later layers leave out
//
// - a layer that leaves the token out attends to nothing for it, adds nothing to its sums and evicts nothing: its key and value go to a
//   slot that is never read, and its victim stays the next one
// - decided in the model's graph, by one custom operation per layer, which also moves the anchors; the sums' indices, the attention
//   kernel and the books of the units follow what it says. On the CPU, one sequence
class llama_kv_filter {
public:
    static constexpr uint32_t N_NODES = 4; // per layer, at most

    struct params {
        double   ratio    = 0.0;
        uint32_t n_layers = 0; // the last ones of the cache
        uint32_t n_warmup = 0; // single tokens that a layer judges before it leaves one out
    };

    llama_kv_filter(const params & p, const std::vector<llama_kv_layer> & layers, const llama_kv_scores & scores);

    bool has(size_t i_layer) const { return i_layer >= i_first; }

    // the ubatch that is computed next; may_skip: it is one token that overwrites a victim
    void set_step(bool may_skip);

    // nodes: judge the token, and move the anchors; before its key and value are written, which are [n_embd_head, n_head_kv, n_tokens]
    void build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, size_t i_layer);

    // nodes: what the attention answers is zero where the layer leaves the token out; kq: its softmax, or flash: its node, which does it
    //   on its own if it is ours
    void gate(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer, ggml_tensor * kq, ggml_tensor * flash, bool is_ours) const;

    // the layer leaves the token of this step out: known from the layer's first node on, until the next step
    bool is_skipped(size_t i_layer) const { return has(i_layer) && lanes[i_layer - i_first].is_skipped; }

    // the step was computed: its tokens are part of the anchors from now on
    void commit();

    // the sequence is empty
    void reset();

    int64_t n_skipped()  const { return n_skip; } // (token, layer), since the sequence was last empty or restored
    int64_t n_possible() const { return n_may; }

    void state_write(llama_kv_state_writer & out) const;
    void state_read (llama_kv_state_reader & in, bool is_check);

private:
    struct lane {
        llama_kv_filter_anchor anchor;
        llama_kv_filter_anchor next; // once the step was computed: one that fails leaves no trace

        bool          is_skipped = false;
        ggml_tensor * node       = nullptr; // of the graph that is built: f32 [1], 0 if the layer leaves the token out, else 1

        llama_kv_filter * owner   = nullptr;
        size_t            i_layer = 0;
    };

    static void op_judge(ggml_tensor * dst, int ith, int nth, void * data);

    const params p;

    const llama_kv_scores & scores;

    size_t i_first = 0; // layer of the cache

    std::vector<lane> lanes; // from i_first on

    bool may_skip = false;

    int64_t n_skip = 0;
    int64_t n_may  = 0;
};
