#pragma once

// what the patches call: see patches/README.md for the list of call sites

#include "llama-kv-cache.h"
#include "llama-kv-ledger.h"
#include "llama-kv-policy-spec.h"
#include "llama-kv-policy.h"
#include "llama-kv-sinks.h"

#include <map>
#include <memory>

// sits between the memory context and the cells of one llama_kv_cache; decides which slot each token takes
class llama_kv_policy {
public:
    using slot_info       = llama_kv_cache::slot_info;
    using slot_info_vec_t = llama_kv_cache::slot_info_vec_t;

    llama_kv_policy(llama_kv_cache & kv, const llama_kv_policy_spec & spec, uint32_t budget);
    ~llama_kv_policy();

    // the context that owns the cache; called once, when the cache is complete
    void attach(const llama_context & lctx);

    //
    // one ubatch: victim, fill, (compute), evict what a chunk brought too much
    //

    // no bookkeeping: which slots a ubatch takes is known only when the one before it has been computed
    slot_info_vec_t prepare(const std::vector<llama_ubatch> & ubatches) const;

    bool apply(slot_info & sinfo, const llama_ubatch & ubatch);

    // the ubatch was computed
    void commit();

    // keep the protected tokens of this ubatch as they are before the cache rounds them; k_cur: [n_embd_head, n_head_kv, n_tokens]
    void capture_k(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, int32_t il) const;

    // false while the graph of this ubatch, or the one built before it, captures
    bool can_reuse() const { return !no_reuse; }

    //
    // llama_memory_i
    //

    void clear();

    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    llama_pos seq_pos_min(llama_seq_id seq_id) const;
    llama_pos seq_pos_max(llama_seq_id seq_id) const;

    // pos_swa: seq_pos_min of the sliding-window cache beside this one
    llama_pos seq_pos_min_iswa(llama_seq_id seq_id, llama_pos pos_swa) const;

    // a whole sequence can be copied into another stream: true, and the ledger has it; upstream copies cells and rows
    bool seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1);

    // log that the operation does nothing under a policy
    void refuse(const char * op) const;

    // throws if the state of the sequence (-1: any) cannot be saved
    void check_state_write(llama_seq_id seq_id) const;

    // throws: a restored cache has no ledger
    [[noreturn]] void check_state_read() const;

    //
    // queries
    //

    const llama_kv_policy_spec & get_spec() const { return spec; }
    const llama_kv_ledger & ledger(llama_seq_id seq_id) const;

    llama_kv_rewind rewind_kind(llama_seq_id seq_id, llama_pos p0) const;

    bool pin(llama_seq_id seq_id, int32_t n);

    bool is_cache_positions() const { return cache_positions; }

    int64_t t_host_us = 0;
    int64_t n_steps   = 0;

private:
    friend std::unique_ptr<llama_kv_policy> llama_kv_policy_make(llama_kv_cache & kv);

    static bool is_boundable(const llama_kv_cache & kv);

    ggml_backend_t get_backend(ggml_backend_buffer_t buffer);

    bool move_rows(uint32_t strm, const std::vector<llama_kv_ledger::move> & moves);
    void move_cell(uint32_t strm, uint32_t src, uint32_t dst, llama_seq_id seq_id);

    llama_kv_cache & kv;

    const llama_kv_policy_spec spec;

    const llama_context * lctx = nullptr;

    bool cache_positions = false;

    std::vector<llama_kv_ledger> ledgers; // [n_stream]

    std::vector<llama_seq_id> inflight; // sequences of the ubatch that is placed but not committed

    std::unique_ptr<llama_kv_sinks> sinks; // positions `cache` only

    std::map<ggml_backend_dev_t, ggml_backend_ptr> backends; // for copies of rows, made on first use

    struct capture_range { uint32_t strm; uint32_t i_tok; uint32_t rank; uint32_t n; };

    std::vector<capture_range> captures; // protected tokens in the current ubatch

    bool no_reuse   = false;
    bool warned_far = false;
    bool broken     = false; // a copy of rows failed: the ledger is ahead of the data
};

//
// seams
//

// the policy of the context under construction on this thread: resolves it, tells llama_kv_cache's constructor, forgets it
// throws std::runtime_error with one sentence if the policy is malformed or cannot work with the model
class llama_kv_policy_scope {
public:
    llama_kv_policy_scope(const llama_model & model, const llama_cparams & cparams, llama_memory_params & params);
    ~llama_kv_policy_scope();

    // throws if the memory is of a kind that cannot be bounded
    void attach(llama_memory_i * memory, const llama_context & lctx) const;
};

// slots per sequence of a cache under construction: kv_size, unless the policy of this thread bounds it
uint32_t llama_kv_policy_n_slots(uint32_t kv_size, llama_swa_type swa_type, bool shared);

// true if the environment names a policy other than none
bool llama_kv_policy_from_env();

// what a failed restore of `size` bytes returns: 0, as upstream, but not where that would look like a success
size_t llama_kv_policy_state_failed(llama_memory_i * memory, size_t size);

// nullptr if the cache is not bounded
std::unique_ptr<llama_kv_policy> llama_kv_policy_make(llama_kv_cache & kv);
