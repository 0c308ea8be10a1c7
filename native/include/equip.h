/* equip.h: a bounded-memory session on the patched llama.cpp, as one narrow C API.
 *
 * - Handles are opaque. No struct crosses the boundary by value, and no call aborts the process on bad input.
 * - A function that returns int gives EQUIP_OK or a negative enum equip_status; equip_error() then holds one sentence
 *   that says what is wrong and what to do. A function that returns a pointer gives NULL instead.
 * - A returned string belongs to the library and is valid until the next call on the same thread.
 * - Options are text: "key=value,key=value". An unknown key or a malformed value is EQUIP_ERR_USAGE.
 * - A model may be shared by threads, and so may a pool, whose sessions wait for each other; a session belongs to one thread at a time. equip_session_cancel() may be called
 *   from any thread and from a signal handler.
 * - After a fork both processes go on, each with its own copy, unless a GPU or a worker was found before: then EQUIP_ERR_BACKEND answers
 *   in the child, and nothing is freed there.
 */
#ifndef EQUIP_H
#define EQUIP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef EQUIP_API
#    define EQUIP_API
#endif

typedef struct equip_model   equip_model;
typedef struct equip_session equip_session;
typedef struct equip_pool    equip_pool;

enum equip_status {
    EQUIP_OK               =   0,
    EQUIP_ERR_USAGE        =  -1, /* malformed option or argument */
    EQUIP_ERR_MODEL_FILE   =  -2, /* missing, empty, truncated, or not a GGUF model */
    EQUIP_ERR_UNSUPPORTED  =  -3, /* a property of the model rules the request out */
    EQUIP_ERR_BUDGET       =  -4, /* the budget cannot hold what must be kept */
    EQUIP_ERR_CONTEXT_FULL =  -5, /* policy none, and no slot is left */
    EQUIP_ERR_BACKEND      =  -6, /* compute failed */
    EQUIP_ERR_MEMORY       =  -7, /* model or cache does not fit */
    EQUIP_ERR_CANCELLED    =  -8, /* equip_session_cancel() was called; the session stays usable */
    EQUIP_ERR_REWIND       =  -9, /* the position lies before the newest evicted one; nothing changed */
    EQUIP_ERR_STATE        = -10, /* a saved session is damaged, or of another model, policy or shape; or its file cannot be read or written */
};

enum equip_stop {
    EQUIP_STOP_LENGTH = 0, /* n tokens were generated */
    EQUIP_STOP_EOG    = 1, /* the model ended its turn; the end token is the last of out[] and is not in the cache */
};

/* ---- library ---------------------------------------------------------------------------------------------------- */

/* raised whenever a declaration here changes its meaning; equip_abi_version() answers what the library was built with, and the
 * Python package refuses a library that answers something else */
#define EQUIP_ABI_VERSION 5

EQUIP_API int equip_abi_version(void);

/* JSON {version, llama_cpp, backends: [name, ...], devices: [{name, description, free_bytes, total_bytes}, ...],
 * instruction_sets: [name, ...] of the CPU backend, left_out: [{name, reason}, ...] which the processor announces,
 * n_threads: where none are asked for: physical cores, within this process's affinity and its control groups' CPU quota} */
EQUIP_API const char * equip_library_info(void);

/* the last error of this thread, one sentence, never NULL */
EQUIP_API const char * equip_error(void);

/* 0: native log is silent (default); 1: warnings and errors; 2: all of it; always on stderr */
EQUIP_API void equip_set_verbosity(int level);

/* JSON [{name, scopes: [...], positions: [...], updates: [...], default_positions, default_scope, scores (it reads attention weights),
 *        pages (whole pages go), evict_every (victims per choice), parameters: [{name, type (real|count|odd), default, published, min, max,
 *        help}, ...] of its formula}, ...] */
EQUIP_API const char * equip_policies(void);

/* whether a text is one of a policy, as far as that shows without a model */
EQUIP_API int equip_policy_check(const char * policy);

/* ---- other machines --------------------------------------------------------------------------------------------- */

/* a worker is gone while it is used; the process aborts when this returns. Called on any thread */
typedef void (*equip_lost_worker)(const char * sentence);

/* "HOST:PORT,..." of workers, whose devices models that are loaded afterwards use; those that are known already are left as they are.
 * A worker serves one program at a time: this waits while it serves another */
EQUIP_API int equip_rpc_add(const char * workers, equip_lost_worker lost);

/* be a worker: lends the devices of this machine, the CPU where there is no other, to one program after the other. endpoint: an address of
 * IPv4 and a port, "127.0.0.1:50052"; n_threads: 0 = equip_library_info()'s. Whoever reaches the port can do what this process can.
 * Returns only if it fails; says on stdout who comes and goes, as upstream words it */
EQUIP_API int equip_rpc_serve(const char * endpoint, int32_t n_threads);

/* ---- model ------------------------------------------------------------------------------------------------------ */

/* progress is 0..1; a callback that returns 0 cancels the load */
typedef int (*equip_progress)(float progress, void * user_data);

/* options: n_gpu_layers (int, -1 = all), use_mmap (0|1), vocab_only (0|1) */
EQUIP_API int  equip_model_load(equip_model ** out, const char * path, const char * options, equip_progress progress, void * user_data);
EQUIP_API void equip_model_free(equip_model * model);

/* JSON {arch, name, n_params, n_layer, n_embd, n_head, n_head_kv, head_dim, n_ctx_train, n_vocab, rope, rope_freq_base,
 *       n_swa, swa_layers, file_bytes, has_chat_template, is_recurrent, is_hybrid, bos, eos, add_bos,
 *       kv_bytes_per_token (f16), supports: {policies, scopes, positions}} */
EQUIP_API const char * equip_model_info(equip_model * model);

/* n tokens, or minus the number needed if n_max is too small */
EQUIP_API int32_t equip_tokenize(equip_model * model, const char * text, int32_t n_text, int add_special, int parse_special, int32_t * tokens, int32_t n_max);

/* bytes of one token's text (may be part of a UTF-8 sequence), or minus the number needed */
EQUIP_API int32_t equip_token_piece(equip_model * model, int32_t token, int special, char * buf, int32_t n_buf);

/* JSON list of the texts that stand for a control token where parse_special is 1, and for themselves where it is 0 */
EQUIP_API const char * equip_control_tokens(equip_model * model);

EQUIP_API int equip_token_is_eog(equip_model * model, int32_t token);

/* messages: JSON [{role, content, ...}, ...] as in the OpenAI chat API; tools: JSON list or NULL;
 * chat_template: Jinja source that replaces the model's own, or NULL. Returns the prompt text. */
EQUIP_API const char * equip_chat_render(equip_model * model, const char * messages, const char * tools, const char * chat_template, int add_generation_prompt);

/* ---- session ---------------------------------------------------------------------------------------------------- */

/* policy: "NAME[:key=value,...]", the grammar of LLAMA_KV_POLICY (docs/policies.md); NULL: what the environment says, else "none"
 * options: n_ctx (policy none: cache size; 0 = trained context; default: as a budget's), n_batch, n_ubatch (0 = default), n_threads (0 = equip_library_info()'s), n_threads_batch,
 *          adapt_threads (0|1: fewer of them where other programs are busy, if no result depends on it; default 1 where n_threads is 0),
 *          flash_attn (auto|on|off), type_k, type_v (f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl), offload_kv (0|1),
 *          cpu_attn (0|1: our own CPU kernel for the attention of single tokens; default 1, but 0 with the policy none),
 *          n_outputs (tokens of a call whose logits are wanted; 1);
 *          context_shift (0|1; policy none: when the cache is full, half of what follows the first n_keep tokens goes, as in llama.cpp's programs),
 *          rope_upstream (0|1; update shift: with upstream's RoPE kernel, to the same bits) */
EQUIP_API int  equip_session_create(equip_session ** out, equip_model * model, const char * policy, const char * options);

/* what such a session would be, or NULL: JSON {text: the policy's, with every setting filled in, policy (its name), budget, n_slots, n_ctx, n_ubatch,
 * kv_bytes}. A budget that is not given: the trained context, at most 4096, less where it would take more than half of the free memory */
EQUIP_API const char * equip_session_plan(equip_model * model, const char * policy, const char * options);

EQUIP_API void equip_session_free(equip_session * session);

/* forget everything; the sampler starts over too */
EQUIP_API int equip_session_reset(equip_session * session);

/* never evict the first n tokens; before the first token only */
EQUIP_API int equip_session_pin(equip_session * session, int32_t n);

/* append tokens, in chunks of n_ubatch; logits of the last one are kept. n_done (may be NULL) counts what entered the cache,
 * also when the call fails */
EQUIP_API int equip_session_eval(equip_session * session, const int32_t * tokens, int32_t n_tokens, int32_t * n_done);

/* evaluate tokens n_chunk per step (1 to n_outputs): nll[i] = -log p(tokens[i] | everything before), in nats; needs the logits of the
 * token before the first one. n_done (may be NULL) counts what was scored and entered the cache, also when the call fails */
EQUIP_API int equip_session_nll(equip_session * session, const int32_t * tokens, int32_t n, int32_t n_chunk, double * nll, int32_t * n_done);

/* options: seed, temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n, ignore_eos (0|1); the default of a number is what the
 * model's file recommends (general.sampling.*), else llama.cpp's
 * grammar: GBNF or NULL; json_schema: JSON or NULL; not both */
EQUIP_API int equip_session_set_sampler(equip_session * session, const char * options, const char * grammar, const char * json_schema);

/* sample, emit and evaluate up to n tokens; *n_out tokens are in out[] also when the call fails */
EQUIP_API int equip_session_generate(equip_session * session, int32_t n, int32_t * out, int32_t * n_out, int * stop);

/* drop the tokens at positions >= p0; returns 0 exact, 1 shortened, or EQUIP_ERR_REWIND; logits are gone until the next eval */
EQUIP_API int equip_session_rewind(equip_session * session, int32_t p0);

/* ask a running eval or generate to stop: between tokens, or between graph nodes of a prompt chunk where the backend can */
EQUIP_API void equip_session_cancel(equip_session * session);

/* logits of the last evaluated token, n_vocab floats, owned by the session; NULL if there are none */
EQUIP_API const float * equip_session_logits(equip_session * session);

/* (position, slot) of the kept tokens ordered by position; returns how many there are, writes at most n_max; where layers or heads
 * keep different tokens, those of the first layer and head */
EQUIP_API int32_t equip_session_kept(equip_session * session, int32_t * pos, int32_t * slot, int32_t n_max);

/* policy external: score[i] is what the token at pos[i] is worth to a KV head of a layer (-1: to all); finite. A token that is kept has it
 * until it goes, one to come from when it is read, and what a head has evicted is left out. Set after a chunk and before anything else,
 * it decides what the chunk evicts. Returns how many of the tokens hold it. A rewind or a failed call that drops tokens forgets theirs,
 * and those of tokens to come */
EQUIP_API int32_t equip_session_set_scores(equip_session * session, int32_t il, int32_t i_head, const int32_t * pos, const float * score, int32_t n);

/* the kept tokens of one KV head ordered by position, with the attention weight that each has received (0 where the policy reads none), or
 * with the score that was set (policy external; NaN where none was) */
EQUIP_API int32_t equip_session_head(equip_session * session, int32_t il, int32_t i_head, int32_t * pos, float * weight, int32_t n_max);

/* every position that some layer or head keeps, ordered, with the share of those that keep it, in (0, 1] */
EQUIP_API int32_t equip_session_shares(equip_session * session, int32_t * pos, float * share, int32_t n_max);

/* JSON {policy, text (of the policy, with every setting filled in), scope, positions, positions_now (what auto does at this moment), rotate_every, n_rotations, evict_every, page_size, parameters: {name: value} of the policy's formula where it is not the default, score_queries (all, none or N), update, budget, sinks, recent, n_ctx, n_ubatch, n_batch, n_threads, flash_attn, type_k, type_v, attn_kernel,
 *       n_past (tokens seen), n_used, n_slots, n_sessions, n_evicted, n_evicted_pool (of these, because others needed room), rope_kernel (update shift: cached|upstream), score_bytes (on the device), ledger_bytes (on the host), device_reads, device_writes (of the policy, where the cache lies on a device), n_filtered (tokens that layers have left out by filter, each counted once per layer), n_filterable (of so many that they could), kv_bytes, graphs_reused, prompt_n, prompt_us, predicted_n, predicted_us,
 *       policy_us, graph_us, n_steps} */
EQUIP_API const char * equip_session_stats(equip_session * session);

/* the session as bytes, also after evictions; n_written = size needed or written. What goes on from it goes on to the bit where model, policy,
 * shapes and threads are the same. Not in it: the sampler (set it again) and the logits of the last token (they come with the next eval) */
EQUIP_API int equip_session_save(equip_session * session, uint8_t * buf, size_t n_buf, size_t * n_written);

/* take over what was saved, in place of what is there; EQUIP_ERR_STATE leaves the session empty, and unusable until it is reset */
EQUIP_API int equip_session_load(equip_session * session, const uint8_t * buf, size_t n_buf);

/* the same with a file, which only its owner may read and which at any time is the old one or the new one as a whole; one that cannot be
 * read changes nothing */
EQUIP_API int equip_session_save_file(equip_session * session, const char * path);
EQUIP_API int equip_session_load_file(equip_session * session, const char * path);

/* benchmark: n more tokens without reading any: copies of the rows that are there; policy none, plain caches (else EQUIP_ERR_UNSUPPORTED) */
EQUIP_API int equip_session_fill(equip_session * session, int32_t n);

/* benchmark: evaluate n single tokens without sampling; ns[i] = wall time of step i, ns_host[i] = the part of it outside graph compute.
 * rewind != 0: drop the token after each step, so that the cache stays at its size (policy none at a fixed depth) */
EQUIP_API int equip_session_time_decode(equip_session * session, int32_t n, int rewind, int64_t * ns, int64_t * ns_host);

/* ---- sessions that share one context ---------------------------------------------------------------------------- */

/* n_sessions of them (an option beside those of a session; 4). With pool=N or pool=auto in the policy they share one bounded cache, by
 * pages: each keeps up to the budget, all together N tokens. Without it each has a cache of its own; with the policy none they share
 * llama.cpp's, of n_ctx tokens for each, or not (unified, 0|1, an option too; 1). Not for update=shift and context_shift */
EQUIP_API int  equip_pool_create(equip_pool ** out, equip_model * model, const char * policy, const char * options);

/* its sessions go on until they are freed */
EQUIP_API void equip_pool_free(equip_pool * pool);

/* JSON {text: the policy's, with every setting filled in, policy (its name), budget, pool (tokens of all sessions together, 0 where each has a
 * cache of its own), n_sessions, n_open, n_slots, n_ubatch, kv_bytes} */
EQUIP_API const char * equip_pool_info(equip_pool * pool);

/* an empty session that nobody has, for all functions above; EQUIP_ERR_USAGE if there is none left. Freed, it gives its room back */
EQUIP_API int equip_pool_session(equip_session ** out, equip_pool * pool);

/* a step of several sessions of one pool in one batch. n_tokens (NULL: zeros): [n_sessions] so many tokens of each are evaluated, which
 * follow each other in tokens; where that is 0, one is sampled and evaluated, unless it ends the turn. sampled: [n_sessions] it, or -1;
 * may be NULL if nothing is sampled. n_done (may be NULL): [n_sessions] those of tokens that entered the cache, also when the call fails */
EQUIP_API int equip_pool_step(equip_session * const * sessions, int32_t n_sessions, const int32_t * tokens, const int32_t * n_tokens, int32_t * sampled, int32_t * n_done);

/* benchmark: as equip_session_time_decode, n steps of one token of each session; sessions of one pool */
EQUIP_API int equip_pool_time_decode(equip_session * const * sessions, int32_t n_sessions, int32_t n, int rewind, int64_t * ns, int64_t * ns_host);

#ifdef __cplusplus
}
#endif

#endif /* EQUIP_H */
