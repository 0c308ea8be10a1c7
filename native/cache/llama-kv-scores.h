#pragma once

#include "llama-kv-formula.h"
#include "llama-kv-layer.h"
#include "llama-kv-sinks.h"
#include "llama-kv-stream.h"
#include "llama-kv-units.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

class llama_kv_filter;
class llama_kv_state_reader;
class llama_kv_state_writer;

enum llama_kv_scope {
    LLAMA_KV_SCOPE_TOKEN, // one victim for all layers and heads
    LLAMA_KV_SCOPE_LAYER, // one per layer
    LLAMA_KV_SCOPE_HEAD,  // one per layer and KV head
};

// attention weights per (layer, slot, KV head), what else a formula needs, and the choice of victims by it
//
// - the sums lie beside the keys of the layer, as f32 [n_rows, n_head_kv, n_stream], and are updated in the model's own graph:
//   where the softmax of the attention is there (no flash attention) it is summed; the CPU's attention kernel of native/ggml
//   writes the sums of a few queries out; else the softmax is computed again from Q and K, in tiles of queries. On the CPU one
//   custom operation per layer (or tile) adds; elsewhere a composition of ggml's operations
// - on the CPU the next victims are chosen at the end of the graph, by all threads
// - elsewhere the graph of a token chooses them too, where a token's worth is a sum or a draw, and one goes at a time: the next graph writes
//   over them, and the host's books follow when somebody asks (llama-kv-scores-device.cpp); else the sums are read back whenever a choice is
//   needed, which is every `evict_every` tokens
// - where a formula's window is not what the sums happen to hold (chunks shorter than it, rewinds), the weights of the last queries are
//   computed again on the host: the queries are kept beside the keys
// - the kept sets of the units live here too, and the row indices by which each head writes to a slot of its own
class llama_kv_scores {
public:
    struct params {
        llama_kv_scope scope   = LLAMA_KV_SCOPE_HEAD;
        uint32_t n_queries     = UINT32_MAX; // the last ones of a ubatch, which count
        uint32_t evict_every   = 1;          // victims per choice
        bool     eager         = false;      // all victims of a choice go at once
        bool     compact       = false;      // update `gather`
        bool     v_trans       = false;
        bool     filters       = false; // layers may leave tokens out
        bool     ranks         = false; // keys are rotated where they lie, by the ranks in each unit
        uint32_t n_ubatch      = 0;
        uint32_t n_sinks       = 0;

        const llama_kv_rope * rope = nullptr; // for a formula that reads keys without their rotation
    };

    // n_slots: of a sequence; where: they lie in the cache; had_v: the Hadamard matrix that the cache's V may be multiplied with (n x n values), or empty
    llama_kv_scores(const llama_kv_formula & formula, const params & p, const std::vector<llama_kv_layer> & layers, const llama_kv_where & where,
            uint32_t n_slots, uint32_t n_seq, uint32_t n_stream, std::vector<float> had_v);

    const params & get_params() const { return p; }

    // tokens of a page; 0: tokens go, not pages
    uint32_t page_size() const { return needs.page_size; }

    bool is_on_cpu() const { return all_cpu; }
    bool is_on_cpu(size_t i_layer) const { return devices.at(states[i_layer]->buft).is_cpu; }

    bool is_per_head() const { return p.scope != LLAMA_KV_SCOPE_TOKEN; } // slots differ between layers

    uint32_t unit_of(size_t i_layer, uint32_t i_head) const {
        return p.scope == LLAMA_KV_SCOPE_TOKEN ? 0 : p.scope == LLAMA_KV_SCOPE_LAYER ? (uint32_t) i_layer : heads[i_layer] + i_head;
    }

    size_t layer_of(uint32_t unit) const { // the inverse, where layers or heads choose
        return p.scope == LLAMA_KV_SCOPE_LAYER ? unit : (size_t) (std::upper_bound(heads.begin(), heads.end(), unit) - heads.begin()) - 1;
    }

    llama_kv_units & units(uint32_t seq) { return units_[seq]; }
    const llama_kv_units & units(uint32_t seq) const { return units_[seq]; }

    //
    // choice
    //

    // the victims in each unit that go next: [n_unit][n]
    struct choice {
        std::vector<uint32_t> slots;
        uint32_t n = 0; // per unit
        uint32_t i = 0; // gone already

        uint32_t n_left() const { return n - i; }
    };

    // which tokens are candidates: positions in [pos_min, pos_max]; before them there are n_protect others
    struct range { int32_t pos_min; int32_t pos_max; uint32_t n_protect; };

    choice & get_choice(uint32_t seq) { return choices[seq]; }

    // fill the choice with n victims per unit, fewer if there are not so many candidates; chunk: no pages
    // the caller has synchronised; false if there are not enough
    bool choose(uint32_t seq, uint32_t n, const range & r, bool chunk);

    // update `gather`: what lies behind a victim has moved up by one slot
    void close_gaps(uint32_t seq, const std::vector<uint32_t> & victims);

    void forget_choice(uint32_t seq) { choices[seq] = {}; behind[seq] = {}; }
    void forget_step() { step.clear(); found_.clear(); }

    // tokens at positions >= p0 are gone (0: the sequence is empty), and what their queries have added is not told apart
    void forget_queries(uint32_t seq, int32_t p0);

    //
    // victims that devices choose
    //

    bool is_on_device() const { return on_device; }

    // the victims of the token that comes next are on the devices, and there is room to remember them
    bool is_ahead(uint32_t seq) const { return behind[seq].ready && behind[seq].row + behind[seq].n + 1 < N_BEHIND; }

    // a token comes, and is written over them: the books do not know which they were
    void run_ahead(uint32_t seq);

    // what the books do not know: the victims of the tokens that came [n][n_unit]; those of the next one, if they are chosen, become the choice
    // the caller has synchronised
    std::vector<std::vector<uint32_t>> catch_up(uint32_t seq);

    // the books miss tokens, or the choice of the next victims
    bool misses_tokens(uint32_t seq) const { return behind[seq].n > 0; }
    bool misses_choice(uint32_t seq) const { return behind[seq].ready && choices[seq].n_left() == 0; }

    // the devices know by how much keys have to be rotated, and can do it (positions by rank, of each unit)
    bool has_debts(llama_kv_rope & rope);

    // rotate all keys by what the victims have left them, those that the next token is written over included; false if that failed
    // the caller has synchronised
    bool rotate_debts(uint32_t seq, llama_kv_rope & rope, llama_kv_backends & backends);

    // the host has rotated them
    void forget_debts(uint32_t seq) { behind[seq].births = behind[seq].births && !debts; }

    // tests: the next victims are what the host chooses by the sums as they are; the books are complete
    bool check_choice(uint32_t seq, const range & r);

    // they know of one more: it was drawn for
    void arrive(uint32_t seq, const std::vector<uint32_t> & unit_slots);

    //
    // one ubatch
    //

    struct seq_step {
        uint32_t seq;
        int32_t  pos0;                    // its tokens: n from pos0 on
        uint32_t n;
        bool     ahead = false;           // its one token goes where the devices say
        std::vector<uint32_t> slots;      // of its tokens, where they are the same in every unit
        std::vector<uint32_t> unit_slots; // [n_unit] of its one token, where they are not
        std::vector<uint32_t> rows;       // where these lie in the cache: filled by set_step()
        std::vector<uint32_t> unit_rows;
        bool     clear = false;           // the sums start over
        bool     want  = false;           // victims will be needed after it
        range    next  = { 0, 0, 0 };        // candidates then
        std::vector<int32_t> debts;       // [n_slots] what keys have to be rotated by, if wants_debts()
    };

    // devices are to learn of the debts with this step, and only the frame knows them
    bool wants_debts(const seq_step & st) const { return debts && !is_per_head() && misses_births(st); }

    // the ubatch that is computed next; the caller has synchronised if a device is among the layers
    void set_step(const std::vector<seq_step> & step);

    // where keys stand, which have been rotated to it: for a formula that reads keys without their rotation
    bool has_stands() const { return needs.k_unrotated; }
    void set_stands(const seq_step & st, int32_t base);          // those of a step: at their positions, less the base
    void set_stand (uint32_t seq, uint32_t slot, int32_t pos); // of one slot, in all units
    void rotate_stands(uint32_t seq, uint32_t unit, const std::vector<llama_kv_units::rotation> & rotations); // by what they were rotated

    // scores that the caller sets (llama-kv-scores-given.cpp)
    bool has_given() const { return needs.given; }

    // of tokens that a head keeps, or that come later than pos_last; i_layer, i_head: -1 = all; returns how many tokens hold one of
    //   them; victims that were chosen by others are forgotten
    uint32_t set_given(uint32_t seq, int32_t i_layer, int32_t i_head, const int32_t * pos, const float * value, uint32_t n, int32_t pos_last);

    // [n_slots] of a sequence, nullptr unless needed
    const float * get_given(uint32_t seq, size_t i_layer, uint32_t i_head) const {
        return needs.given ? kept_state[seq].data() + (size_t) (heads[i_layer] + i_head)*n_slots : nullptr;
    }

    // those of tokens to come
    void forget_to_come(uint32_t seq);
    void state_write_to_come(llama_kv_state_writer & out, uint32_t seq) const;
    void state_read_to_come(llama_kv_state_reader & in,  uint32_t seq, int32_t pos_last, bool is_check);

    // layers may leave a token out (llama-kv-filter.cpp): it is written to no slot of this layer, which the graph calls for
    void set_filter(const llama_kv_filter * f) { filter = f; }
    void divert(size_t i_layer) const;

    // where its key and value go: the last row belongs to the headroom, which is empty between chunks, so nothing reads it
    uint32_t row_never_read() const { return n_rows - 1; }

    // where those of the one token of the step go
    int64_t row_of_step(size_t i_layer, uint32_t i_head) const {
        const auto & l = *states[i_layer];
        return devices.at(l.buft).idx_host[l.i_head + i_head];
    }

    // it was computed: take over the victims that its graph has chosen; false if it could not choose
    bool commit();

    // what is written to a layer in the graph that is built; k_cur, v_cur: [n_embd_head, n_head_kv, n_tokens]
    void set_written(ggml_tensor * k_cur, ggml_tensor * v_cur, size_t i_layer, uint32_t s0, uint32_t ns) const { states[i_layer]->written = { k_cur, v_cur, s0, ns }; }

    // nodes: its norms, as far as the formula needs them. By build(), behind the write, so that a device may rotate and write a key at once
    void build_norms(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer) const;

    struct attention {
        ggml_tensor * q;     // [n_embd_head, n_tokens, n_head, n_stream], rows may be strided
        ggml_tensor * k;     // [n_embd_head, n_kv, n_head_kv, n_stream]
        ggml_tensor * kq;    // [n_kv, n_tokens, n_head, n_stream] the softmax, or nullptr
        ggml_tensor * flash; // the node that can write the sums out beside its result, or nullptr
        ggml_tensor * mask;
        ggml_tensor * sinks; // or nullptr
        float scale;
        float soft_cap;      // 0: none
        float max_bias;
        bool  is_first;      // no other layer of the model has attended to these keys before
        bool  is_last;       // no other layer follows
        bool  is_last_here;  // none on the device of these keys
    };

    // nodes: add the weights of the ubatch
    void build(ggml_context * ctx, ggml_cgraph * gf, const attention & a, size_t i_layer, uint32_t s0) const;

    // sequences in one stream of the graph that is built, each with equally many tokens
    uint32_t n_sharing() const { return where.pool ? std::max<uint32_t>(1, (uint32_t) step.size()) : 1; }

    // upper bound for the nodes that build() and build_norms() add to a graph
    uint32_t n_nodes(uint32_t n_tokens) const;

    // nodes: write the key, or the value, of one token per stream, each head to its own slot; cur: [n_embd_head, n_head_kv, n_stream]
    ggml_tensor * build_rows(ggml_context * ctx, ggml_tensor * cur, size_t i_layer, uint32_t s0, bool is_v) const;

    //
    // between ubatches; the caller has synchronised
    //

    void clear();

    void move(uint32_t seq, const llama_kv_units::moves & moves);
    void copy(uint32_t src, uint32_t dst);

    // saved states (llama-kv-scores-state.cpp); slots: the occupied ones, ascending
    // read: throws if no sequence with this ledger can ever look like that; is_check: nothing is changed
    void state_write(llama_kv_state_writer & out, uint32_t seq, const std::vector<uint32_t> & slots) const;
    void state_read (llama_kv_state_reader & in,  uint32_t seq, const llama_kv_ledger::image & ledger, uint32_t n_recent, uint32_t budget,
            const std::vector<uint32_t> & slots, bool may_record, bool is_check);

    // sums of a KV head: [n_rows]; nullptr if the formula needs no weights
    const float * get_weights(uint32_t seq, size_t i_layer, uint32_t i_head);

    const llama_kv_traffic & get_traffic() const { return traffic; }

    size_t n_bytes()        const; // on the devices of the layers
    size_t n_bytes_ledger() const; // host

private:
    // one number per (slot, KV head): the part of a layer of the device's planes
    struct plane {
        ggml_tensor * t = nullptr;  // f32 [n_rows, n_head_kv, n_stream]
        uint32_t i_kind = 0;
    };

    struct device {
        // of all its layers, so that a read-back is one: f32 [n_rows, n_head, n_stream*n_kind]; weights are the first kind
        ggml_tensor * planes = nullptr;
        uint32_t      n_kind = 0;

        // what was read back of one stream: [n_rows, n_head, n_kind], in memory that the device copies to at full speed if it has such
        float *                 host = nullptr;
        std::vector<float>      host_vec;
        ggml_backend_buffer_ptr host_buf;

        ggml_tensor * idx_head  = nullptr; // i64 [n_head, n_seq]: row of the one token
        ggml_tensor * idx_v     = nullptr; // i64 [sum of n_embd_v_gqa*n_seq]: transposed V, an index per element, so that threads share them
        ggml_tensor * idx_chunk = nullptr; // i64 [n_ubatch]: rows of several
        ggml_tensor * zeros     = nullptr; // f32 [n_ubatch*n_head_kv]
        ggml_tensor * powers    = nullptr; // f32 [n_ubatch]: decay^(n_ubatch - 1 - i)
        ggml_tensor * counts    = nullptr; // f32 [n_ubatch], in a pool: what a query's weights are multiplied with
        ggml_tensor * shrinks   = nullptr; // f32 [n_rows], in a pool: what the sums are multiplied with
        ggml_tensor * idx_query = nullptr; // i64 [window, n_seq]: where the last queries of a ubatch go
        ggml_tensor * had_v     = nullptr;
        ggml_tensor * queries   = nullptr; // f32 [n_embd_head, n_head, n_layer, n_stream]: of one token, to weigh in all layers at once
        ggml_tensor * sums      = nullptr; // f32 [n_rows, n_head_kv, n_stream]: of the layer that is computed, by the attention's own kernel

        // victims that are chosen here: the planes are more then, see kind_birth()
        ggml_tensor * victims = nullptr; // i32 [n_unit, n_stream]: the row that the one token is written to
        ggml_tensor * rows    = nullptr; // i64 [n_unit, n_stream], the same where a kernel of ours writes it: what operations fuse with
        ggml_tensor * history = nullptr; // f32 [n_unit, N_BEHIND*n_stream]: those of the last tokens
        ggml_tensor * now     = nullptr; // f32: what changes from token to token, see now_part
        ggml_tensor * now_row = nullptr; // i32 [n_stream], the first part of it: row of the history (f32 for a kernel of ours)

        ggml_tensor * advance = nullptr; // f32: what the graph adds to `now` behind a token, where a kernel of ours reads it; then the host
                                         //   writes it when something else comes than the next token

        std::vector<float> advance_host;

        std::vector<float> now_host;
        std::vector<float> now_then;         // what the device will have behind the token
        bool               now_known = false; // it has that

        llama_kv_keys keys; // of its layers

        // its backend has kernels for the weights of one token, and for the choice (ggml-kv-score.h)
        bool has_node         = false;
        bool has_weights_node = false;
        std::vector<ggml_tensor *> k_stack; // [n_layer] keys, if the heads of all layers are alike

        mutable std::vector<std::pair<size_t, attention>> waiting; // layers of the graph that is built whose queries are kept

        uint32_t n_unit = 0; // units
        uint32_t n_per  = 0; // heads of each

        std::vector<int64_t> idx_host;   // what goes into idx_head
        std::vector<int64_t> idx_v_host; // and into idx_v

        uint32_t n_layer  = 0;
        uint32_t n_head   = 0; // sum of n_head_kv
        size_t   i_first  = 0; // its first layer
        uint32_t n_embd_v = 0; // sum of n_embd_v_gqa
        bool     is_cpu   = false;

        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
    };

    struct layer_state {
        ggml_backend_buffer_type_t buft;
        uint32_t i_head   = 0; // first one of the device's
        uint32_t i_stack  = 0; // in `queries` and `keys`
        uint32_t i_unit   = 0; // where the device chooses: first one of its units
        uint32_t i_embd_v = 0; // first one in idx_v

        plane weights;
        plane k_norm;
        plane v_norm;

        // of the graph that is built, i64 [1]: the row of the one token, which is the same in all heads, or nullptr
        mutable ggml_tensor * row = nullptr;

        // whose norms are still to be taken, see set_written()
        struct written_t { ggml_tensor * k_cur = nullptr; ggml_tensor * v_cur = nullptr; uint32_t s0 = 0; uint32_t ns = 0; };
        mutable written_t written;

        // a formula with a window: the last queries, the one at position p in row p % window, as attention has them
        ggml_tensor * queries = nullptr; // f32 [n_embd_head*n_head, window, n_seq]
        mutable attention attn = {};     // how they are multiplied with the keys: scale, soft_cap, sinks

        std::vector<uint8_t> k_host; // rows read back
        std::vector<uint8_t> v_host;

        const llama_kv_scores * owner = nullptr;
        size_t i_layer = 0;
    };

    struct scratch;

    static void op_add   (ggml_tensor * dst, int ith, int nth, void * data);
    static void op_choose(ggml_tensor * dst, int ith, int nth, void * data);

    // the part of one thread; throws std::bad_alloc
    void choose_part(int ith, int nth) const;

    const float * data(const layer_state & l, const plane & pl, uint32_t strm, uint32_t i_head) const;

    // sums and denominators of a unit, over every nth of its heads from the first on; into s.sum, s.den
    void sum_unit(uint32_t seq, uint32_t unit, const range & r, uint32_t first, uint32_t nth, scratch & s) const;

    // the n lowest candidates of a unit; false if there are fewer
    bool pick(uint32_t unit, uint32_t n, const range & r, bool chunk, const scratch & s, std::vector<uint32_t> & out) const;

    void view_unit(uint32_t seq, uint32_t unit, scratch & s) const;
    void read_rows(uint32_t strm, size_t i_layer, uint32_t i_head, bool is_v, const scratch & s, std::vector<float> & out) const;

    uint32_t n_candidates(uint32_t seq, const range & r) const;

    // GraphKV: the scores of candidates that are like the best ones; n of the unit's candidates will go
    void lower_alike(uint32_t seq, uint32_t unit, uint32_t n, const range & r, scratch & s) const;

    // read back what is not in host memory; keys: those too, whatever the formula needs
    void fetch(uint32_t strm, bool keys = false);

    // the sums are those of the formula's window: the last queries before a choice
    uint32_t n_queries_kept(uint32_t seq) const;
    bool     is_window(uint32_t seq) const { return needs.window == 0 || n_counted[seq] == std::min(needs.window, n_queries_kept(seq)); }
    void     sum_window(uint32_t seq);

    static std::vector<uint32_t> query_rows(const std::vector<int32_t> & pos);

    // f(i_layer, plane, data): change one stream of all planes on the host; data: f32 [n_rows, n_head_kv]
    template <typename F>
    void edit(uint32_t strm, F && f);

    // kinds that the host reads: sums and norms
    uint32_t n_kind_host() const { return (uint32_t) needs.weights + (uint32_t) needs.k_l2 + (uint32_t) (needs.v_l1 || needs.v_l2); }

    // one stream of a device's planes, from it and to it
    void get_planes(device & d, uint32_t strm);
    void set_planes(device & d, uint32_t strm);

    // victims that devices choose: whether they can, and what they need
    bool may_choose() const;
    bool can_choose(const device & d, ggml_backend_buffer_type_t buft) const;
    void add_choice(device & d, ggml_context * ctx) const;
    void init_choice(device & d, ggml_context * ctx) const;

    enum now_part { NOW_ROW, NOW_CLOCK, NOW_FRESH }; // i32 [n_stream]; f32 [n_stream]; f32 [n_head, n_kind, n_stream]

    // kinds of planes: what the worth is made of, one or two of them, then the birth and, with ranks, the debt
    uint32_t kind_birth() const { return std::max(1u, n_kind_host()); }
    uint32_t kind_debt()  const { return kind_birth() + 1; }

    ggml_tensor * plane_of(ggml_context * ctx, const device & d, uint32_t kind, uint32_t strm) const;
    ggml_tensor * victims_of(ggml_context * ctx, const device & d, uint32_t strm) const;
    size_t now_offset(now_part part) const; // elements

    // f(unit of the device, unit)
    template <typename F>
    void for_units(ggml_backend_buffer_type_t buft, F && f) const;

    void set_choice(bool one);
    void set_births(const seq_step & st);
    bool misses_births(const seq_step & st) const; // devices do not know what lies where
    void set_now(device & d);

    static float draw(uint32_t unit, int32_t pos);

    void build_rotation(llama_kv_graph & graph, const device & d, ggml_backend_buffer_type_t buft, uint32_t strm, llama_kv_rope & rope) const;
    size_t n_nodes_choice(const device & d) const { return 64 + 24*n_stream + 5*d.n_per; } // of begin_choice() and build_choice(), views included
    static size_t n_nodes_rotation(const device & d) { return 20*d.n_layer + 48; }
    void add_debts(ggml_context * ctx, ggml_cgraph * gf, const device & d, uint32_t strm) const;
    void begin_choice(ggml_context * ctx, ggml_cgraph * gf, const device & d, uint32_t s0, int64_t ns) const;
    void build_choice(ggml_context * ctx, ggml_cgraph * gf, const device & d, uint32_t s0, int64_t ns) const;

    void clear_sums(uint32_t seq);
    void set_weights_of_queries();

    // the units of the layers that have left the token of the step out are as before it
    void take_back_skipped();

    // and on a device (llama-kv-filter-graph.cpp)
    void begin_filtered(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer, ggml_tensor * gate) const;
    bool choose_beside_skipped();

    uint32_t n_head_unfiltered(const device & d) const;

    void save_drawn(uint32_t seq, uint32_t unit, uint32_t slot, int32_t pos);
    void clear_state(const seq_step & st);
    void take_to_come(const seq_step & st);

    // nodes
    ggml_tensor * softmax(ggml_context * ctx, const attention & a, int64_t t0, int64_t n) const;
    // in which place of the indices the i-th sequence of a graph is
    uint32_t lane(uint32_t s0, uint32_t i) const { return where.pool ? i : s0 + i; }

    void keep_queries(ggml_context * ctx, ggml_cgraph * gf, const attention & a, size_t i_layer, uint32_t s0) const;
    void add_sums(ggml_context * ctx, ggml_cgraph * gf, const attention & a, size_t i_layer) const;
    void add_tile(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * sm, size_t i_layer, uint32_t s0, int64_t t0, int64_t n_tokens, bool first) const;
    void init_stack(device & d, ggml_backend_buffer_type_t buft, ggml_context * ctx) const;
    bool can_wait(const attention & a, size_t i_layer) const;
    void wait   (ggml_context * ctx, ggml_cgraph * gf, const attention & a, size_t i_layer, uint32_t s0) const;
    void add_all(ggml_context * ctx, ggml_cgraph * gf, const device & d, uint32_t s0) const;
    ggml_tensor * weights_node(ggml_context * ctx, const device & d, size_t i, size_t n, uint32_t s0) const;
    void add_heads(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * acc, const std::vector<ggml_tensor *> & heads_of) const;
    ggml_tensor * idx_of(ggml_context * ctx, const device & d, uint32_t i_head, uint32_t n_head, uint32_t lane) const;
    ggml_tensor * row_of(ggml_context * ctx, size_t i_layer, uint32_t lane) const;
    ggml_tensor * write(ggml_context * ctx, ggml_tensor * dst, ggml_tensor * rows, const layer_state & l, uint32_t i_layer, uint32_t lane, uint32_t i_tok, int64_t n) const;
    void build_row(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer, int64_t n_tokens) const;
    void begin_sums(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer, uint32_t s0, int64_t ns, int64_t n_each) const;

    int64_t tile_size(int64_t n_kv, int64_t n_head) const;
    uint32_t first_query(int64_t n_tokens) const;

    // not all queries of a sequence's n tokens count alike
    bool weighs_queries(int64_t n) const { return needs.decay != 1.0f || first_query(n) > 0; }

    const llama_kv_formula & formula;
    const llama_kv_formula_needs needs;

    // the formula, if devices can follow it
    const llama_kv_formula_product * const as_product;
    const params p;

    const std::vector<llama_kv_layer> & layers;

    const llama_kv_where & where;

    const llama_kv_filter * filter = nullptr; // or none

    // write to a tensor of a device before its step
    void put(const device & d, ggml_tensor * t, const void * data, size_t offs, size_t size);

    llama_kv_traffic traffic;

    const uint32_t n_slots; // of a sequence
    const uint32_t n_rows;  // of a stream
    const uint32_t n_seq;
    const uint32_t n_stream;

    std::vector<uint32_t> heads; // [n_layer + 1] KV heads of the layers before
    std::vector<uint32_t> iota;  // [n_slots]

    std::vector<std::unique_ptr<layer_state>> states; // [n_layer]
    std::map<ggml_backend_buffer_type_t, device> devices;

    bool all_cpu   = true;
    bool on_device = false; // devices choose
    bool debts_known = false; // whether the devices can rotate by them
    bool debts       = false; // and know what the keys of units with ranks of their own have to be rotated by

    // what the devices know, and the books do not
    struct behind_t {
        bool     ready  = false; // victims of the next token
        bool     births = false; // they know when the kept tokens came
        uint32_t row    = 0;     // of the history: victims of the first token that the books miss,
        uint32_t n      = 0;     //   and so many tokens, and then those of the next token
        int32_t  origin = 0;     // births are counted from here
    };
    static constexpr uint32_t N_BEHIND = 64;

    std::vector<behind_t> behind; // [n_seq]

    std::vector<llama_kv_units> units_;  // [n_seq]
    std::vector<choice>         choices; // [n_seq]

    std::vector<std::vector<float>>   drawn;  // [n_seq] of [n_unit, n_slots]
    std::vector<std::vector<int32_t>> stands; // [n_seq] of [n_unit, n_slots]: the position that the key was rotated to

    mutable std::vector<std::vector<float>> kept_state; // [n_seq] of [KV heads of all layers, n_slots]: what the formula remembers, or the caller has set

    std::vector<std::map<int32_t, std::vector<float>>> to_come; // [n_seq] position of a token to come -> [KV heads of all layers] what the caller has set

    std::vector<std::vector<int32_t>> query_pos; // [n_seq][window] position of the query in that row, or none
    std::vector<uint32_t>             n_counted; // [n_seq] queries in the sums

    std::vector<seq_step> step;

    // filled by op_choose: [sequence of the step]
    struct found {
        choice c;
        std::vector<std::vector<float>> sum; // scope token: [thread][n_slots], summed by commit()
        std::vector<std::vector<float>> den;
        bool done = false;
    };
    mutable std::vector<found> found_;
    mutable std::atomic<bool>  failed { false }; // op_choose: no memory, or too few candidates
};
