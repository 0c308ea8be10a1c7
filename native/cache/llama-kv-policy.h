#pragma once

// bounded KV cache: the C API that the policy adds to libllama
// nothing in llama.h changes; a program that ignores this header is bounded through the environment:
//   LLAMA_KV_POLICY="streaming:budget=1024,sinks=4,positions=cache,rotate_every=32"

#include "llama.h"

#include "llama-kv-policy-status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum llama_kv_rewind {
    LLAMA_KV_REWIND_EXACT      = 0, // no token at or after p0 evicted anything
    LLAMA_KV_REWIND_SHORTENED  = 1, // the kept set is a subset of what a run that stopped at p0 keeps
    LLAMA_KV_REWIND_IMPOSSIBLE = 2, // p0 lies at or before the newest evicted position
};

struct llama_kv_policy_stats {
    int64_t n_evicted; // evictions since the sequence was last empty
    int32_t n_used;    // occupied slots
    int32_t n_slots;   // slots allocated per sequence, chunk headroom included
    int32_t budget;    // most tokens kept after a step
    int32_t n_protect; // sinks and pinned tokens: the positions [0, n_protect) are never evicted
    int64_t t_host_us; // host time spent in the policy since the context was made
    int64_t n_steps;   // ubatches placed since the context was made

    int64_t n_rotations;  // batches of rotations, beside those of the sinks, since the sequence was last empty
    int32_t rotate_every; // evictions between two of them; 0 with positions `true`
    bool    is_ranks;     // tokens have their rank as position now (positions `auto` goes over to that)

    int32_t evict_every;   // victims per choice; 0 if they follow from positions alone
    int32_t page_size;     // 0 if tokens go, not pages
    int32_t score_queries; // the last queries of a ubatch that count, 0 = all, -1 if no attention weights are read
    int64_t score_bytes;   // beside the keys: weights and norms, of all sequences
    int64_t ledger_bytes;  // on the host: which token sits where, of all sequences

    int64_t n_evicted_pool; // evictions because others needed room

    int64_t n_device_reads;  // of scores, keys and values from a device, since the context was made; each waits for it
    int64_t n_device_writes; // of slots, rows and distances to it

    int64_t n_filtered;   // (token, layer) that filter has left out, since the sequence was last empty or restored
    int64_t n_filterable; // of so many that it judged at a full cache
};

struct llama_kv_policy_layer {
    int64_t n_embd_k;  // elements of one K row in the cache, 0 if the layer has no KV cache of its own
    int64_t n_embd_v;  // elements of one V row in the cache, 0 if V is not stored
    int32_t n_head_kv;
    bool    is_swa;    // the layer sees a sliding window only
};

// tokens that the model has learned positions for: no sequence can be longer; 0 if its positions are of another kind
LLAMA_API int32_t llama_kv_policy_n_pos_max(const struct llama_model * model);

// the sliding window in tokens, 0 if the model has none (llama_model_n_swa answers 0 when the environment bounds the contexts)
LLAMA_API int32_t llama_kv_policy_n_swa(const struct llama_model * model);

// false if there is no such layer
LLAMA_API bool llama_kv_policy_get_layer(const struct llama_model * model, int32_t il, struct llama_kv_policy_layer * layer);

// the policy of the next context that this thread makes: "NAME[:key=value,...]"; wins over the environment
// "none" switches it off, NULL gives the choice back to the environment
LLAMA_API void llama_kv_policy_set_next(const char * spec);

// the i-th policy of the registry as "NAME:scope=a|b,positions=a|b,update=a|b,recent=0|1,scores=0|1,pages=0|1,evict_every=N", the
//   default of each list first; scores: it reads attention weights; evict_every: its own default; NULL past the end
LLAMA_API const char * llama_kv_policy_describe(int32_t i);

// a number of a policy's formula that its text may set: "a2sf:decay=0.9"
struct llama_kv_policy_param {
    const char * name;
    const char * type; // "real", "count" (a whole number) or "odd" (an odd one)
    double def;
    double published;  // the authors'
    double min;
    double max;
    const char * help; // one line
};

// the j-th one of the i-th policy of the registry; false past the end
LLAMA_API bool llama_kv_policy_get_param(int32_t i, int32_t j, struct llama_kv_policy_param * param);

// whether a text is one of a policy, without a model; if not, llama_kv_policy_error() says why
LLAMA_API enum llama_kv_policy_status llama_kv_policy_check(const char * text);

struct llama_kv_policy_resolved {
    const char * text;     // with every setting filled in; valid until the next call on this thread
    const char * name;     // "none" without a policy
    int64_t      budget;   // tokens per sequence; without a policy those of the context
    int64_t      n_slots;  // per sequence, chunk headroom included
    int64_t      kv_bytes; // of all sequences, sliding-window layers included
    uint32_t     n_ubatch;
};

// what a policy's text comes to with this model and these parameters, of which n_ctx = 0 is no limit and n_ubatch = 0 the policy's
//   default; if it is refused, llama_kv_policy_error() says why
// a budget that is not given: the trained context, at most 4096 tokens, less where that would take more than half of the free memory
LLAMA_API enum llama_kv_policy_status llama_kv_policy_resolve(const struct llama_model * model, const struct llama_context_params * params, const char * text, struct llama_kv_policy_resolved * res);

// bytes that this process can still allocate on the host without swapping, within its limits; 0 if the system does not tell
LLAMA_API int64_t llama_kv_policy_memory_free(void);

// one sentence: why the model rules out this policy at this scope (the default one if it names none), or NULL; valid until the next
//   call on this thread
LLAMA_API const char * llama_kv_policy_why_not(const struct llama_model * model, const char * spec);

// one sentence, which names settings: why the last context, check or resolution of this thread was refused, or NULL; and its status
LLAMA_API const char *                llama_kv_policy_error(void);
LLAMA_API enum llama_kv_policy_status llama_kv_policy_error_status(void);

// name of the policy that bounds the context, "none" if there is none
LLAMA_API const char * llama_kv_policy_name(const struct llama_context * ctx);

// the rule of the context's positions: "true", "cache" or "auto"; "true" without a policy
LLAMA_API const char * llama_kv_policy_positions(const struct llama_context * ctx);

// the property of the model that rules out positions `cache` ("this model has ..."), or NULL
LLAMA_API const char * llama_kv_policy_no_ranks(const struct llama_model * model);

// the flash attention setting that upstream resolved `auto` to
LLAMA_API bool llama_kv_policy_flash_attn(const struct llama_context * ctx);

// what single tokens attend with: "equip-cpu" (our own kernel), "upstream-fa" (upstream's flash attention) or "upstream" (without)
LLAMA_API const char * llama_kv_policy_attn_kernel(const struct llama_context * ctx);

// threads of the last graph, where their number follows the load of the machine (adapt_threads); else 0
LLAMA_API int32_t llama_kv_policy_n_threads_now(const struct llama_context * ctx);

// false if the context has no policy
LLAMA_API bool llama_kv_policy_get_stats(const struct llama_context * ctx, llama_seq_id seq_id, struct llama_kv_policy_stats * stats);

// (position, slot) of the kept tokens, ordered by position; returns how many there are, writes at most n_max
// works without a policy too; where layers or heads keep different tokens, those of the first layer and head
LLAMA_API int32_t llama_kv_policy_get_kept(const struct llama_context * ctx, llama_seq_id seq_id, llama_pos * pos, int32_t * slot, int32_t n_max);

// policy `external`: what tokens are worth to a KV head of a layer; -1 = all heads, all layers. Tokens that the head keeps have it until
//   they go, tokens to come from when they are written; one that the head has evicted is left out, and what was set before is replaced
// the evictions that the last chunk owes are decided by it, unless something asks before what is kept; dropped tokens take theirs along,
//   and those of tokens to come are forgotten with them
// returns how many of the tokens hold it somewhere; -1 and nothing has changed: llama_kv_policy_error() says why
LLAMA_API int32_t llama_kv_policy_set_scores(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t i_head, const llama_pos * pos, const float * score, int32_t n);

// the kept tokens of one KV head ordered by position, with their attention weights as summed so far (0 if the policy reads none), or with
//   the scores that were set (policy `external`; NaN where none was);
//   returns how many there are, writes at most n_max; -1 if there is no such layer or head under the policy
LLAMA_API int32_t llama_kv_policy_get_head(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t i_head, llama_pos * pos, float * weight, int32_t n_max);

// every position that is kept somewhere, ordered, and which share of the layers and KV heads that choose for themselves keeps it
LLAMA_API int32_t llama_kv_policy_get_shares(const struct llama_context * ctx, llama_seq_id seq_id, llama_pos * pos, float * share, int32_t n_max);

// the stored key of the token at this position in the layer il, as bytes of the cache's type; returns the size of a row, 0 if the
//   token is not there or the layer has no key under the policy; copies it if size is large enough
LLAMA_API size_t llama_kv_policy_get_key(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, llama_pos pos, void * data, size_t size);

// how far the keys of the protected tokens stand from where they were written, in positions
LLAMA_API int32_t llama_kv_policy_get_delta(const struct llama_context * ctx, llama_seq_id seq_id);

// every invariant of the books, and that the cells agree with them; for tests
LLAMA_API bool llama_kv_policy_is_sound(const struct llama_context * ctx);

// a sequence of a pool keeps this many tokens at most, now and until it is told another number, whatever the others do; for tests
// false, and nothing changes, without a pool, or if that is less than it needs, or more than there is
LLAMA_API bool llama_kv_policy_allot(struct llama_context * ctx, llama_seq_id seq_id, int32_t n);

// what llama_memory_seq_rm(seq_id, p0, -1) would do now
LLAMA_API enum llama_kv_rewind llama_kv_policy_rewind_kind(const struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0);

// the newest tokens that can always be taken back: how long a draft may be; INT32_MAX without a policy
LLAMA_API int32_t llama_kv_policy_n_rewind(const struct llama_context * ctx);

// never evict the first n tokens of the sequence (the sinks are protected anyway)
// false, and nothing changes, if there is no policy, if the budget cannot hold them beside the recent ones, or if the sequence is not empty
LLAMA_API bool llama_kv_policy_pin(struct llama_context * ctx, llama_seq_id seq_id, int32_t n);

// why a state of a bounded cache was not saved, or not restored, by llama_state_*
enum llama_kv_state_status {
    LLAMA_KV_STATE_OK          = 0,
    LLAMA_KV_STATE_CORRUPT     = 1, // truncated, or its bytes have changed
    LLAMA_KV_STATE_VERSION     = 2, // written by another version
    LLAMA_KV_STATE_MODEL       = 3, // of another model
    LLAMA_KV_STATE_SETTINGS    = 4, // of another policy, or none where there is one, or with other settings: budget, types, shapes, rotations
    LLAMA_KV_STATE_SEQUENCE    = 5, // there is no such sequence, or it is in no state to be saved
    LLAMA_KV_STATE_BUFFER      = 6, // the caller's buffer, or list of tokens, is too small
    LLAMA_KV_STATE_FILE        = 7, // cannot be read, or written
    LLAMA_KV_STATE_MEMORY      = 8, // out of memory
    LLAMA_KV_STATE_UNSUPPORTED = 9, // states that stay on a device
};

// of the last llama_state_* call on this thread that concerned a bounded cache; sentence (may be NULL): NULL if it went well, else valid
//   until the next such call
LLAMA_API enum llama_kv_state_status llama_kv_policy_state_status(const char ** sentence);

// what tells a model from others of its shape: a checksum over its tensors' names, shapes and some of their weights as this machine holds them
LLAMA_API uint32_t llama_kv_policy_model_print(const struct llama_model * model);

// benchmarks: append n tokens to a sequence without a policy, whose rows of K and V are copies of those already there
// false, and nothing changes, if the memory is not one plain cache that holds the beginning of this sequence alone, or has no room
LLAMA_API bool llama_kv_policy_fill(struct llama_context * ctx, llama_seq_id seq_id, int32_t n);

// upstream's own time in graph compute since the context was made, in microseconds (exact where compute is synchronous: CPU)
LLAMA_API int64_t llama_kv_policy_graph_us(const struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
