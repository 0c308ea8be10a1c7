#pragma once

// what the patches call: see patches/README.md for the list of call sites

#include "llama-kv-cache.h"
#include "llama-kv-filter.h"
#include "llama-kv-gather.h"
#include "llama-kv-ledger.h"
#include "llama-kv-policy-spec.h"
#include "llama-kv-policy.h"
#include "llama-kv-pool.h"
#include "llama-kv-positions.h"
#include "llama-kv-scores.h"
#include "llama-kv-stream.h"

#include <map>
#include <memory>

class llama_memory_recurrent;

// sits between the memory context and the cells of one llama_kv_cache; decides which slot each token takes
class llama_kv_policy {
public:
    using slot_info       = llama_kv_cache::slot_info;
    using slot_info_vec_t = llama_kv_cache::slot_info_vec_t;

    // n_ubatch, n_seq: of the context; with a pool they decide how large it is
    llama_kv_policy(llama_kv_cache & kv, const llama_kv_policy_spec & spec, uint32_t budget, uint32_t n_ubatch, uint32_t n_seq);
    ~llama_kv_policy();

    // the context that owns the cache; called once, when the cache is complete
    // kv_swa: the sliding-window cache beside this one, or nullptr: it follows when the positions are re-based
    void attach(const llama_context & lctx, const llama_kv_cache * kv_swa);

    //
    // one ubatch: victim, fill, (compute), evict what a chunk brought too much
    //

    // no bookkeeping: which slots a ubatch takes is known only when the one before it has been computed
    slot_info_vec_t prepare(const std::vector<llama_ubatch> & ubatches) const;

    // false, and one sentence in the log: nothing has changed, or is_lost()
    bool apply(slot_info & sinfo, const llama_ubatch & ubatch);

    // the ubatch was computed
    void commit();

    // carry out the evictions that a chunk owes; throws std::exception, and then the sequence is lost
    void settle(llama_seq_id seq_id);

    // what is kept of new keys and values beside the cache: norms, originals, an un-rotated copy; and sinks rewritten in the graph
    // k_cur: [n_embd_head, n_head_kv, n_tokens], v_cur the same or nullptr
    // is_reserve: a graph is built for no ubatch, to reserve memory: learn how the keys of a layer, of this cache or of the
    //   sliding-window one beside it, are rotated; throws std::runtime_error if positions by rank are not possible with that
    void capture(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, int32_t il, const slot_info & sinfo, bool is_reserve);

    // the write of K or V, where heads write to slots of their own; else nullptr
    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, int32_t il, const slot_info & sinfo) const;
    ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, int32_t il, const slot_info & sinfo) const;

    // keep the attention weights of this ubatch; kq: the softmax [n_kv, n_tokens, n_head, n_stream], or nullptr with flash attention;
    //   flash: that one's node, or nullptr
    void score(ggml_context * ctx, ggml_cgraph * gf, int32_t il, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq, ggml_tensor * flash,
            ggml_tensor * mask, ggml_tensor * sinks, float scale) const;

    // most nodes that the above add to a graph
    uint32_t n_nodes(uint32_t n_tokens) const;

    // the graph that was built last fits this ubatch too, as far as the above is concerned
    bool can_reuse() const { return !positions || positions->can_reuse(); }

    //
    // llama_memory_i
    //

    void clear();

    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // what seq_rm would answer
    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // the context has this sequence
    bool has_seq(llama_seq_id seq_id) const;

    // the sequence is empty, and its owner may not know: nothing but its beginning is accepted until it is cleared
    void poison(llama_seq_id seq_id) { conditions[seq_id].poisoned = true; }

    bool is_poisoned(llama_seq_id seq_id) const { return conditions[seq_id].poisoned; }

    // a step has failed half way, and the books do not fit the data: nothing is accepted until it is cleared
    bool is_lost(llama_seq_id seq_id) const { return conditions[seq_id].lost; }

    // first position of the last ubatch, which may still be taken back; def if that is settled
    llama_pos pos_placed_or(llama_seq_id seq_id, llama_pos def) const {
        return ledger(seq_id).pos_placed() == llama_kv_ledger::none ? def : ledger(seq_id).pos_placed();
    }

    llama_pos seq_pos_min(llama_seq_id seq_id) const;
    llama_pos seq_pos_max(llama_seq_id seq_id) const;

    // pos_swa: seq_pos_min of the sliding-window cache beside this one
    llama_pos seq_pos_min_iswa(llama_seq_id seq_id, llama_pos pos_swa) const;

    // the ledger of a whole sequence is copied to another one, before upstream copies cells and rows
    // false if that cannot be; throws std::exception
    bool seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst);

    //
    // saved states (llama-kv-policy-state.cpp); the caller has synchronised
    //

    // what a state can be restored into: "key=value,..." with the policy, its settings, shapes and rotations
    std::string state_settings() const;

    // throws llama_kv_state_error if the sequence cannot be saved
    void state_check_write(llama_seq_id seq_id) const;

    // nothing is changed by it, not even evictions that a chunk owes
    void state_write(llama_kv_state_writer & out, llama_seq_id seq_id) const;

    // room for what states with so many protected tokens have beside the cache; throws std::exception, and then nothing has changed
    void state_reserve(uint32_t n_protect);

    // swa: the sliding-window cache beside this one, or nullptr
    // is_check: nothing is changed, and llama_kv_state_error is thrown if these bytes can be no sequence of this cache
    // else the sequence is empty, and they have been checked; returns the number of protected tokens
    uint32_t state_read(llama_kv_state_reader & in, llama_seq_id seq_id, llama_kv_cache * swa, bool is_check, llama_pos & pos_last);

    // sequences share one cache, by pages
    bool is_pool() const { return pool != nullptr; }

    // see llama_kv_policy_allot
    bool allot(uint32_t seq, uint32_t n);

    // tokens that went because the allotment was less than the budget, since the sequence was last empty or restored
    int64_t n_evicted_pool(llama_seq_id seq_id) const { return evicted_pool[seq_id]; }

    // see llama_kv_policy_is_sound
    bool check() const;

    uint32_t n_seq() const { return (uint32_t) ledgers.size(); }

    //
    // queries
    //

    const llama_kv_policy_spec & get_spec() const { return spec; }
    const llama_kv_ledger & ledger(llama_seq_id seq_id) const;

    // of the ledger, without waiting for a device
    uint32_t n_budget (llama_seq_id seq_id) const { return ledgers[seq_id].budget(); }
    uint32_t n_used   (llama_seq_id seq_id) const { return ledgers[seq_id].n_used(); }
    int64_t  n_evicted(llama_seq_id seq_id) const { return ledgers[seq_id].n_evicted() + (int64_t) arrivals[seq_id].size(); }

    llama_kv_rewind rewind_kind(llama_seq_id seq_id, llama_pos p0) const;

    // the newest tokens that can always be taken back
    int32_t n_rewind() const;

    bool pin(llama_seq_id seq_id, int32_t n);

    const char * positions_name() const;

    bool is_rotating() const { return positions != nullptr; }

    // evictions between two batches of rotations
    uint32_t rotate_every() const;

    bool has_quantized_keys() const { return !layers.empty() && ggml_is_quantized(layers[0].k->type); }

    // nullptr where the victims follow from positions alone
    llama_kv_scores * get_scores() const { return scores.get(); }

    const llama_kv_filter * get_filter() const { return filter.get(); }

    // heads or layers keep different tokens
    bool is_per_head() const { return scores && scores->is_per_head(); }

    uint32_t evict_every()   const; // victims per choice
    int64_t  score_queries() const; // the last queries of a ubatch that count, 0 = all

    size_t index_of(int32_t il) const; // of the cache's layer that the model's layer il attends to, or SIZE_MAX

    // tokens of the sequence have their rank as position now
    bool is_ranks(llama_seq_id seq_id) const;

    // batches of rotations since the sequence was last empty
    int64_t n_rotations(llama_seq_id seq_id) const;

    llama_kv_traffic get_traffic() const;

    // see llama-kv-policy.h
    int32_t get_head  (llama_seq_id seq_id, int32_t il, int32_t i_head, llama_pos * pos, float * weight, int32_t n_max);
    int32_t get_shares(llama_seq_id seq_id, llama_pos * pos, float * share, int32_t n_max) const;
    int32_t set_scores(llama_seq_id seq_id, int32_t il, int32_t i_head, const llama_pos * pos, const float * score, int32_t n);
    size_t  get_key  (llama_seq_id seq_id, int32_t il, llama_pos pos, void * data, size_t size) const;
    int32_t get_delta(llama_seq_id seq_id) const;

    int64_t t_host_us = 0;
    int64_t n_steps   = 0;

    std::shared_ptr<void> state_model; // what the states of this context say of its model, once it was computed

    // see llama_kv_policy_fill
    static bool extend(llama_kv_cache & kv, llama_seq_id seq_id, uint32_t n, int n_threads);

private:
    void observe_k(const ggml_tensor * k_cur, int32_t il);
    void make_filter();

    friend std::unique_ptr<llama_kv_policy> llama_kv_policy_make(llama_kv_cache & kv);

    static bool is_boundable(const llama_kv_cache & kv);

    // cells and rows of one stream of a cache, bounded or not
    static void state_write_rows(llama_kv_state_writer & out, const llama_kv_cache & c, uint32_t strm, const std::vector<uint32_t> & slots);
    static void state_read_rows (llama_kv_state_reader & in,  llama_kv_cache & c, uint32_t strm, llama_seq_id seq_id, const std::vector<uint32_t> & slots,
            const std::vector<llama_pos> & pos, bool is_check);

    // what needs the rotations of all layers; false if it does not fit into memory
    bool prepare_layers();

    static std::vector<llama_kv_layer> layers_of(const llama_kv_cache & kv);
    static std::vector<float> hadamard_of(const llama_kv_cache & kv, bool of_v = false);

    // the parts of apply(): what can come, then for each sequence the books and the data, then what graphs read; these throw std::exception
    // moves: rows that have to be copied together
    bool accepts(uint32_t seq, const llama_pos * pos, uint32_t n);

    // the pool (llama-kv-policy-pool.cpp): before anything is placed, larger allotments where n tokens come, at the cost of those that
    //   hold more than their share; then pages for the slots; then what is no longer needed goes back
    void make_room(uint32_t seq, uint32_t n);
    void shrink   (uint32_t seq, uint32_t n);
    bool take_from_richest(uint32_t seq); // a page less for the one that holds most; false if nobody but seq is above the share
    void set_allotment(uint32_t seq, uint32_t n);
    void count_evictions(uint32_t seq, size_t n);
    void drop_lost(uint32_t seq); // a sequence that a failed step has left incomplete holds nothing any more
    void settle_all();

    uint32_t n_recent_of(uint32_t seq, uint32_t allotment) const;
    void take_pages(uint32_t seq, const std::vector<uint32_t> & slots);
    void take_pages_of(uint32_t seq, const std::vector<llama_kv_ledger::move> & moves); // of where they go
    void keep_pages(uint32_t seq);
    void restore_room(uint32_t seq, uint32_t n, const std::vector<uint32_t> & slots); // throws std::runtime_error if there is none
    bool copy_pages(uint32_t src, uint32_t dst); // false, and dst has none, if there is no room

    uint32_t least(uint32_t seq) const { return std::min(budget, llama_kv_pool::least(ledgers[seq].n_protect(), scores ? scores->page_size() : 0)); }

    // as they lie in the cache
    std::vector<llama_kv_ledger::move> row_moves(uint32_t seq, const std::vector<llama_kv_ledger::move> & moves) const;
    void place  (uint32_t seq, llama_pos pos0, std::vector<uint32_t> & slots, std::vector<llama_kv_ledger::move> & moves);
    void fill   (uint32_t seq, llama_pos pos0, const std::vector<uint32_t> & slots, const std::vector<llama_kv_ledger::move> & moves, uint32_t i_tok,
            const llama_ubatch & ubatch);
    void set_inputs(const slot_info & sinfo, const llama_ubatch & ubatch);

    // update `gather`: the keys that lie together now, rotated afresh
    void rotate_gathered(uint32_t seq, const llama_kv_frame::plan & plan, uint32_t n_kept);

    // `true` alone: kept tokens are further away than the model has seen
    void warn_far(uint32_t seq, llama_pos pos0);

    // copy the rows of the cache, and what belongs to them, as the ledger and the units have moved their tokens
    bool copy_rows(uint32_t seq, const std::vector<llama_kv_ledger::move> & moves, uint32_t n_kept);

    // tokens of a full cache that were written over victims which devices have chosen, and which the ledger, the units and the cells
    //   do not know yet (llama-kv-policy-ahead.cpp)
    struct arrival {
        llama_pos         pos;
        llama_kv_cell_ext ext;
        bool              rotated; // the units' keys, before it was computed
    };

    // one token each comes to full caches, and the devices know the victims
    bool can_run_ahead(const llama_ubatch & ubatch);

    // the step without the books
    void run_ahead(const llama_ubatch & ubatch);

    // the books take over what devices have chosen; with_choice: the victims of the next token too
    // const, since nothing else can tell the difference; if that fails, the sequence is lost
    void catch_up(uint32_t seq, bool with_choice = false) const;
    void replay(uint32_t seq, const arrival & a, const std::vector<uint32_t> & victims);

    // carry out the evictions that a chunk owes, where the books are complete
    void settle_placed(uint32_t seq);

    llama_pos pos_last(uint32_t seq) const { return arrivals[seq].empty() ? ledgers[seq].pos_last() : arrivals[seq].back().pos; }

    // scores: a token comes to a full cache; its victims, [n_unit], or none where they have made room already
    std::vector<uint32_t> take_victims(uint32_t seq, llama_pos pos0);

    // scores: the units follow the ledger
    void place_units(uint32_t seq, llama_pos pos0, const std::vector<uint32_t> & slots, const std::vector<uint32_t> & given);

    // positions that may go while pos_last is the newest
    llama_kv_scores::range candidates(uint32_t seq, llama_pos pos_last) const;

    bool is_single(const ggml_tensor * cur, int32_t il, const slot_info & sinfo) const;

    bool on_cpu() const;

    // upstream's cells, and what is known of the keys in them, follow the ledger
    void move_cells(uint32_t seq, const std::vector<llama_kv_ledger::move> & moves);

    // newest position that was evicted in any layer or head, or none
    llama_pos evicted_max(uint32_t seq) const;

    llama_kv_cache & kv;

    const llama_kv_policy_spec spec;

    const llama_context * lctx = nullptr;

    const llama_kv_cache * kv_swa = nullptr;

    const uint32_t budget;

    std::unique_ptr<llama_kv_pool> pool; // nullptr: a stream for each sequence
    llama_kv_where                 where;

    std::vector<int64_t>           evicted_pool; // [n_seq] tokens that made room for others
    std::vector<bool>              is_given;     // [n_seq] tests: the allotment was set by allot(), and stays

    std::vector<llama_kv_ledger> ledgers; // [n_seq]

    std::vector<std::vector<arrival>> arrivals; // [n_seq]

    struct condition {
        bool poisoned = false;
        bool lost     = false;
    };

    std::vector<condition> conditions; // [n_seq]

    std::vector<uint32_t> inflight; // sequences of the ubatch that is placed but not computed

    std::vector<llama_kv_layer> layers;

    std::unique_ptr<llama_kv_backends> backends;  // rows copied
    std::unique_ptr<llama_kv_rope>     rope_formula; // for a formula that reads keys without their rotation, with any positions

    std::unique_ptr<llama_kv_formula>      formula;
    std::unique_ptr<llama_kv_scores>    scores;
    std::unique_ptr<llama_kv_filter>    filter;    // or none
    std::unique_ptr<llama_kv_positions> positions; // nullptr with positions `true`
    std::unique_ptr<llama_kv_gather>    gather;

    std::vector<llama_kv_scores::seq_step> step; // of the current ubatch

    llama_kv_units::moves unit_moves; // the last ones

    int32_t il_last = 0; // the model's last layer that attends to this cache

    std::map<ggml_backend_buffer_type_t, int32_t> il_last_on; // and to keys in buffers of this type

    std::vector<bool> unrotated; // [n_seq] gather: rows were copied, and the keys are to be rotated afresh

    bool is_prepared = false;

    bool warned_far = false;
};

//
// seams
//

// the policy of the context under construction on this thread: resolves it, tells llama_kv_cache's constructor, forgets it
// throws std::runtime_error with one sentence if the policy is malformed or cannot work with the model
class llama_kv_policy_scope {
public:
    // ctx_other: of a draft, the context that it drafts for
    llama_kv_policy_scope(const llama_model & model, const llama_cparams & cparams, llama_memory_params & params, const llama_context * ctx_other);
    ~llama_kv_policy_scope();

    // throws if the memory is of a kind that cannot be bounded
    void attach(llama_memory_i * memory, const llama_context & lctx) const;

    // single tokens are attended to by our own CPU kernel, where it covers their shape
    bool cpu_attn(const llama_model & model) const;

    // the number of threads may follow the load of the machine
    bool adapt_threads() const;

    // in place of n_ctx_seq where a model has other RoPE factors for long contexts (LongRoPE); 0: n_ctx_seq
    uint32_t n_ctx_rope(const llama_model & model) const;
};

// why the context under construction on this thread cannot be made; throws
[[noreturn]] void llama_kv_policy_refuse(const std::string & sentence);

// tokens that the model has learned absolute positions for, 0 if it has none
int64_t llama_kv_policy_n_learned(const llama_model & model);

// slots per sequence of a cache under construction: kv_size, unless the policy of this thread bounds it
uint32_t llama_kv_policy_n_slots(uint32_t kv_size, llama_swa_type swa_type, bool shared);

// true if the environment names a policy other than none
bool llama_kv_policy_from_env();

// n_ctx of a context: where 0 was asked for the trained one, under a policy for each sequence that has a stream of its own; of a draft model
//   beside a pool, as much for each sequence as its target has
uint32_t llama_kv_policy_n_ctx(const llama_model & model, const llama_context_params & params);

// llama.h's functions for sequences: under a policy all parts of the memory do it, or none (where nothing is bounded: upstream's answer)
// - ids that the context does not have: as empty sequences
// - a copy that is refused leaves its target empty and poisoned, since the caller is told nothing
bool      llama_kv_policy_seq_rm  (llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
void      llama_kv_policy_seq_cp  (llama_memory_i * memory, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
void      llama_kv_policy_seq_keep(llama_memory_i * memory, llama_seq_id seq_id);
void      llama_kv_policy_seq_add (llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift);
void      llama_kv_policy_seq_div (llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d);
llama_pos llama_kv_policy_seq_pos_min(const llama_memory_i * memory, llama_seq_id seq_id);
llama_pos llama_kv_policy_seq_pos_max(const llama_memory_i * memory, llama_seq_id seq_id);

// what seq_rm would answer, where a policy bounds the memory
bool llama_kv_policy_can_rm(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

// the last ubatch failed or was aborted: its tokens, from p0 on, go; what cannot go back so far is emptied and poisoned
void llama_kv_policy_drop(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0);

// a state could not be taken over: the sequence (-1: all) is empty, and its owner may not know
void llama_kv_policy_poison(llama_memory_i * memory, llama_seq_id seq_id);

// the caches of a memory: of the layers with full attention, if it is of a kind that can be bounded, and of those with a window; or nullptr
llama_kv_cache  * llama_kv_policy_base(llama_memory_i * memory);
llama_kv_cache  * llama_kv_policy_swa (llama_memory_i * memory);
llama_kv_policy * llama_kv_policy_of  (llama_memory_i * memory);

// the recurrent part of a memory that can be bounded, or nullptr
llama_memory_recurrent * llama_kv_policy_recr(llama_memory_i * memory);

// nullptr if the cache is not bounded
std::unique_ptr<llama_kv_policy> llama_kv_policy_make(llama_kv_cache & kv);

// hand the attention of one layer to the policy, if the memory that the graph is built for has one
void llama_kv_policy_score(const llama_memory_context_i * mctx, ggml_context * ctx, ggml_cgraph * gf, int32_t il, ggml_tensor * q, ggml_tensor * k,
        ggml_tensor * kq, ggml_tensor * flash, ggml_tensor * mask, ggml_tensor * sinks, float scale);

// mark a node of flash attention for our own CPU kernel, if the context wants that
void llama_kv_policy_mark_attn(const llama_cparams & cparams, ggml_tensor * node);

// the node is marked, and the kernel covers its shape
bool llama_kv_policy_is_ours(const ggml_tensor * node);

// the same for single tokens in the first layer of this cache
bool llama_kv_policy_single_is_ours(const llama_cparams & cparams, const llama_hparams & hparams, const llama_kv_cache & kv);

// most nodes that a policy adds to a graph of n tokens
uint32_t llama_kv_policy_n_nodes(llama_memory_i * memory, uint32_t n_tokens);
