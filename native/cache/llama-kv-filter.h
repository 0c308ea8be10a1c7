#pragma once

#include "llama-kv-backend.h"

#include <cstddef>
#include <cstdint>
#include <map>
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

    // where a device judges, the counts are kept here, and all else is exchanged with it: k, v, and the three numbers of the control
    struct control { float mean; float distance; float threshold; };

    // what the next single token changes: mean by share, distance = keep*distance + gain*(its own), threshold by first*similarity
    struct weights { float share; float keep; float gain; float first; };

    weights next() const;
    void    count(bool is_single);

    const std::vector<float> & get_k() const { return k; }
    const std::vector<float> & get_v() const { return v; }

    control get_control() const { return { (float) state.mean, (float) state.distance, (float) state.threshold }; }

    void set(const float * k_new, const float * v_new, const control & c);

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
// - decided in the model's graph. On the CPU by one custom operation per layer, which also moves the anchors; the sums' indices, the
//   attention kernel and the books of the units follow what it says
// - on a device by ggml's own operations, on anchors that lie there (llama-kv-filter-graph.cpp): the result of the attention is multiplied
//   by the gate, and the host reads the gates of a step back
// - one sequence
class llama_kv_filter {
public:
    static constexpr uint32_t N_NODES = 120; // per layer, at most, views included

    struct params {
        double   ratio    = 0.0;
        uint32_t n_layers = 0; // the last ones of the cache
        uint32_t n_warmup = 0; // single tokens that a layer judges before it leaves one out
    };

    llama_kv_filter(const params & p, const std::vector<llama_kv_layer> & layers, const llama_kv_scores & scores);

    bool has(size_t i_layer) const { return i_layer >= i_first; }

    // the ubatch that is computed next, of n tokens, after the scores know it; may_skip: it is one token that overwrites a victim
    // the caller has synchronised if a device is among the layers
    void set_step(bool may_skip, uint32_t n_tokens);

    // nodes: judge the token, and move the anchors; before its key and value are written, which are [n_embd_head, n_head_kv, n_tokens]
    void build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, size_t i_layer);

    // nodes: what the attention answers is zero where the layer leaves the token out; kq: its softmax, or flash: its node, which does it
    //   on its own if it is ours
    void gate(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer, ggml_tensor * kq, ggml_tensor * flash, bool is_ours) const;

    // the layer leaves the token of this step out, until the next step: known from the layer's first node on, or by read_gates()
    bool is_skipped(size_t i_layer) const { return has(i_layer) && lanes[i_layer - i_first].is_skipped; }

    // a layer may leave the token of this step out
    bool may_be_skipped() const;

    // those of devices; it was computed, and the caller has synchronised
    void read_gates();

    // of the graph that is built, where a device judges a single token: the gate, f32 [1], and the rows to write to, i32 [1, n_head_kv]
    ggml_tensor * get_gate(size_t i_layer) const { return has(i_layer) && lanes[i_layer - i_first].rows ? lanes[i_layer - i_first].node : nullptr; }
    ggml_tensor * get_rows(size_t i_layer) const { return has(i_layer) ? lanes[i_layer - i_first].rows : nullptr; }

    // the step was computed: its tokens are part of the anchors from now on
    void commit();

    // the sequence is empty
    void reset();

    int64_t n_skipped()  const { return n_skip; } // (token, layer), since the sequence was last empty or restored
    int64_t n_possible() const { return n_may; }

    const llama_kv_traffic & get_traffic() const { return traffic; }

    void state_write(llama_kv_state_writer & out) const;
    void state_read (llama_kv_state_reader & in, bool is_check);

private:
    struct lane {
        llama_kv_filter_anchor anchor;
        llama_kv_filter_anchor next; // once the step was computed: one that fails leaves no trace

        bool          is_skipped = false;
        ggml_tensor * node       = nullptr; // of the graph that is built: f32 [1], 0 if the layer leaves the token out, else 1
        ggml_tensor * rows       = nullptr; // on a device

        llama_kv_filter * owner   = nullptr;
        size_t            i_layer = 0;
        uint32_t          n_head  = 0;

        ggml_backend_buffer_type_t buft = nullptr; // of a device that judges, or none

        // there: what was committed in row i_row, and what the step makes of it in the other one
        ggml_tensor * k       = nullptr; // f32 [n_embd_k_gqa, 2]
        ggml_tensor * v       = nullptr; // f32 [n_embd_v_gqa, 2]
        ggml_tensor * control = nullptr; // f32 [3, 2]
        uint32_t      i_lane  = 0; // of the device's
        uint32_t      i_head  = 0;
    };

    struct device {
        ggml_tensor * now    = nullptr; // f32: what changes from step to step, see now_part
        ggml_tensor * idx    = nullptr; // i32 [2], the first part of it: the row to read, the row to write
        ggml_tensor * gates  = nullptr; // f32 [n_lane]
        ggml_tensor * powers = nullptr; // f32 [n_ubatch + 1]: what each token of a chunk adds to the anchors, the newest one last

        uint32_t n_lane = 0;
        uint32_t n_head = 0;

        std::vector<float> now_host;

        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
    };

    // i32 [2]; the weights of the anchors and may; f32 [n_head]: row of the token, from the one that is never read on
    enum now_part { NOW_IDX = 0, NOW_WEIGHTS = 64, NOW_ROWS = 128 };

    static void op_judge(ggml_tensor * dst, int ith, int nth, void * data);

    // devices
    void init_devices();
    void check(ggml_backend_buffer_type_t buft) const; // throws if it cannot compute what is needed
    void put(ggml_tensor * t, const void * data, size_t offs, size_t size);
    void set_devices();
    void fetch(lane & l) const;

    static void gate_there(ggml_context * ctx, ggml_tensor * t, ggml_tensor * gate);

    void build_there(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, lane & l) const;
    ggml_tensor * build_gate(ggml_context * ctx, const device & d, ggml_tensor * similarity, ggml_tensor * & control) const;
    ggml_tensor * build_faded(ggml_context * ctx, const device & d, ggml_tensor * anchor, ggml_tensor * cur) const;

    const params p;

    const llama_kv_scores & scores;
    const std::vector<llama_kv_layer> & layers;

    size_t i_first = 0; // layer of the cache

    std::vector<lane> lanes; // from i_first on

    std::map<ggml_backend_buffer_type_t, device> devices;

    uint32_t i_row    = 0;
    bool     is_stale = false; // the host has other anchors than the devices

    llama_kv_traffic traffic;

    bool may_skip  = false;
    bool is_single = false; // one token

    int64_t n_skip = 0;
    int64_t n_may  = 0;
};
