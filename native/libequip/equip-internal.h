#pragma once

// shared by the files of libequip; nothing here crosses the library's boundary

#ifndef EQUIP_API
#    if defined(_WIN32)
#        define EQUIP_API __declspec(dllexport)
#    else
#        define EQUIP_API __attribute__((visibility("default")))
#    endif
#endif

#include "equip.h"
#include "llama-kv-ledger.h"
#include "llama-kv-policy.h"
#include "llama.h"

#include "common.h"
#include "sampling.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

// ---- errors ----

// thrown inside, turned into a status and a sentence at the boundary
struct equip_failure {
    int         status;
    std::string sentence;
};

#if defined(__GNUC__) && !defined(_WIN32)
#    define EQUIP_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#    define EQUIP_PRINTF(a, b)
#endif

[[noreturn]] EQUIP_PRINTF(2, 3) void equip_fail(int status, const char * fmt, ...);

EQUIP_PRINTF(1, 2) std::string equip_format(const char * fmt, ...);

int equip_set_error(int status, const std::string & sentence); // returns status

int equip_set_current_exception(); // inside a catch block: the sentence and the status that fit it

// the body of every extern "C" function runs in here: no exception leaves the library
template <typename F, typename R>
R equip_guard(R on_error, F && body) noexcept {
    try {
        return body();
    } catch (...) {
        equip_set_current_exception();
        return on_error;
    }
}

template <typename F>
int equip_guard_status(F && body) noexcept {
    try {
        return body();
    } catch (...) {
        return equip_set_current_exception();
    }
}

// the calling thread's buffer for returned strings
const char * equip_return(std::string text);

// ---- upstream's log ----

// while alive, upstream's log lines of this thread are collected; nested scopes collect for the outermost one
class equip_log_scope {
  public:
    equip_log_scope();
    ~equip_log_scope();

    equip_log_scope(const equip_log_scope &) = delete;
    equip_log_scope & operator=(const equip_log_scope &) = delete;

    std::string first_error() const; // without the function's name; empty if there was none
    std::string last_error()  const; // the same, skipping "failed to load model", which says nothing
    bool        mentions(const char * text) const;

    std::string quote()       const; // " (upstream says: ...)" or empty, of the last error
    std::string quote_first() const; // of the first one: where later lines only report what followed from it

  private:
    std::vector<std::string>   lines;
    std::vector<std::string> * outer;
};

// ---- upstream's assertions ----

// while alive, an assertion of upstream that fails on this thread is a std::runtime_error. Not around a graph's compute: there
// other threads would wait for this one
class equip_abort_scope {
  public:
    equip_abort_scope();
    ~equip_abort_scope();

    equip_abort_scope(const equip_abort_scope &) = delete;
    equip_abort_scope & operator=(const equip_abort_scope &) = delete;
};

// ---- texts that upstream's parsers recurse over ----

// throw EQUIP_ERR_USAGE; `what` begins the sentence: "the messages are"
void equip_check_json_depth(const char * text, const char * what);
void equip_check_template_depth(const char * text);

// ---- options ----

// "key=value,key=value"; every getter marks its key as known, finish() refuses what is left
class equip_options {
  public:
    explicit equip_options(const char * text);

    bool        has(const char * key) const;
    std::string get_word (const char * key, const std::string & def);
    int64_t     get_int  (const char * key, int64_t def, int64_t min, int64_t max);
    int64_t     get_count(const char * key, int64_t def); // any whole number of up to 18 digits; the caller judges it
    double      get_float(const char * key, double  def, double  min, double  max);
    bool        get_bool (const char * key, bool    def);
    void        finish() const;

  private:
    struct item {
        std::string key;
        std::string value;
        bool        known;
    };

    std::vector<item> items;

    item * find(const char * key);
};

// ---- library ----

void equip_init(); // backends, log: the first call does the work; throws where none can be used
void equip_set_rope_upstream(bool value); // the CPU backend's RoPE kernel
void equip_install_log();

// a forked process inherits what the CPU computes with, but no GPU and no connection to a worker: not even to free what lies there
void equip_note_process(); // this is the process that finds devices
bool equip_is_cut_off();   // this is a fork of the one that found some
void equip_check_fork();   // throws EQUIP_ERR_BACKEND if so

std::vector<ggml_backend_dev_t> equip_devices(); // those that can take layers: GPUs, and what workers lend

uint64_t equip_gpu_memory_free(int * n_devices); // their sum; n_devices may be NULL

// the policies that libllama knows, as text: see llama_kv_policy_describe
struct equip_policy_desc {
    std::string              name;
    std::vector<std::string> scopes;
    std::vector<std::string> positions;
    std::vector<std::string> updates;
    bool                     takes_recent;
    bool                     reads_scores; // attention weights
    bool                     has_pages;
    int64_t                  evict_every;  // victims per choice; 0 if they follow from positions alone

    std::vector<llama_kv_policy_param> params; // numbers of its formula
};

std::vector<equip_policy_desc> equip_policy_registry(); // without "none"

// ---- model ----

// what a model file says before upstream reads it
struct equip_file_info {
    std::string arch;
    int64_t     n_tensors  = 0;
    uint64_t    file_bytes = 0; // all parts of a split file
};

// refuses what upstream would only answer with an abort or a vague sentence
equip_file_info equip_inspect_file(const std::string & path);

struct equip_chat_template; // equip-chat.cpp

// a session keeps its model alive, so the order in which handles are freed does not matter
struct equip_model_state {
    llama_model *       model = nullptr;
    const llama_vocab * vocab = nullptr;

    std::string path;
    std::string arch;
    uint64_t    file_bytes   = 0;
    int32_t     n_gpu_layers = 0;     // 0 if no device takes layers
    bool        has_hparams  = false; // false: the file holds a vocabulary only
    bool        has_weights  = false;

    std::vector<llama_kv_policy_layer> layers; // [n_layer]

    std::mutex                           chat_mutex;
    std::shared_ptr<equip_chat_template> chat; // the template used last, parsed

    ~equip_model_state();

    std::string meta(const std::string & key) const; // without "ARCH." for keys that begin with a dot; empty if missing
    std::string cannot_generate() const;             // a sentence for models that no session can run, else empty

    // bytes of one slot in the layers that the policy bounds, or in the sliding-window ones
    int64_t slot_bytes(ggml_type type_k, ggml_type type_v, bool swa) const;
};

struct equip_model {
    std::shared_ptr<equip_model_state> state;
};

// ---- session ----

struct equip_session_params {
    std::string policy; // name, "none" included
    std::string spec;   // its complete text
    std::string scope;
    std::string update;

    int64_t budget = 0;
    int64_t pool   = 0; // tokens of all sessions; 0: each has a stream of its own
    int64_t sinks  = 0;
    int64_t recent = 0;

    std::vector<std::pair<std::string, double>> params; // numbers of the policy's formula that are not the default

    int64_t n_slots = 0; // of the full-attention layers, in all streams
    int64_t n_swa_slots = 0;

    int32_t n_sessions = 1;

    llama_context_params cparams;

    bool offload_kv    = true;
    bool context_shift = false; // policy none: half of a full cache goes, as llama.cpp's programs do it
    bool rope_upstream = false; // update=shift: with upstream's own RoPE kernel
};

// threads where none are asked for: physical cores, within the affinity of this process and the quota of its control groups
int32_t equip_default_threads();

// policy: nullptr = the environment's, else none; is_pool: the options are those of a pool of sessions
equip_session_params equip_parse_session(const equip_model_state & model, const char * policy, const char * options, bool is_pool = false);

int equip_status_of(llama_kv_policy_status status);

// throws EQUIP_ERR_MEMORY, before anything is allocated
void equip_check_model_memory  (uint64_t model_bytes, bool use_gpu);
void equip_check_session_memory(const equip_model_state & model, const equip_session_params & params);

// tokens kept for the penalties of a sampler that is made later
static const size_t EQUIP_N_HISTORY = 4096;

struct equip_session;

// a context and the sessions on it: one, or those of a pool, which all have a sequence of their own
struct equip_pool_state {
    std::shared_ptr<equip_model_state> model;
    equip_session_params               params;

    llama_context * ctx   = nullptr;
    llama_batch     batch = {}; // one chunk: [n_ubatch] tokens, or one of each session

    std::vector<equip_session *> sessions; // [n_seq] nullptr: nobody has that sequence

    std::recursive_mutex mutex; // sessions of a pool may be used from several threads, by turns

    std::atomic<equip_session *> may_abort { nullptr }; // whose chunk may be left in the middle

    ~equip_pool_state();

    // the body of a function on a session, or on several of one pool: nobody else uses the context meanwhile
    std::unique_lock<std::recursive_mutex> lock() {
        equip_check_fork();
        return std::unique_lock<std::recursive_mutex>(mutex);
    }
};

struct equip_pool {
    std::shared_ptr<equip_pool_state> state;
};

struct equip_session {
    std::shared_ptr<equip_pool_state>  pool; // alone in it, or not
    std::shared_ptr<equip_model_state> model;
    equip_session_params               params;

    std::unique_ptr<llama_kv_ledger> shift; // update=shift: what sits where; nullptr otherwise

    llama_context * ctx = nullptr; // the pool's
    llama_seq_id    seq = 0;

    // set from any thread; upstream polls it between graph nodes while the pool's may_abort is this session
    std::atomic<bool> cancelled { false };

    int32_t n_ctx    = 0;
    int32_t n_ubatch = 0;
    int32_t n_past   = 0; // position of the next token = tokens seen
    int32_t n_shifted = 0; // context_shift: tokens dropped, by which the cache's positions lag behind

    // a token that generate() has handed out but could not evaluate; it is evaluated before anything else
    llama_token pending    = LLAMA_TOKEN_NULL;
    bool        has_logits = false;
    bool        is_lost    = false; // a step has failed, and libllama has emptied the cache

    int32_t            i_logits = -1; // which of the context's outputs are the logits of the last token
    std::vector<float> logits;        // they themselves, once others have used the context; else empty

    common_params_sampling   sampling;
    common_sampler_ptr       sampler;
    std::vector<llama_token> history; // the newest tokens, for penalties when the sampler is made anew

    int64_t prompt_n     = 0;
    int64_t prompt_us    = 0;
    int64_t predicted_n  = 0;
    int64_t predicted_us = 0;

    equip_session() = default;
    ~equip_session();

    std::unique_lock<std::recursive_mutex> lock() const { return pool->lock(); }
};

// the next tokens of a session
struct equip_part {
    equip_session * session;
    const int32_t * tokens;
    int32_t         n;
};

// one llama_decode, for sessions of one pool; returns EQUIP_OK or an error that is already set; n_logits: of how many of the last tokens
int  equip_decode_parts(const std::vector<equip_part> & parts, int32_t n_logits);
int  equip_decode_chunk(equip_session & session, const int32_t * tokens, int32_t n_tokens, int32_t n_logits);
const float * equip_logits(const equip_session & session); // of the last token; there are some
void equip_clear(equip_session & session); // its sequence is empty
int64_t equip_kv_bytes(llama_context * ctx); // all slots and all layers, sliding-window and recurrent ones included
int  equip_flush_pending(equip_session & session);
bool equip_is_bounded(const equip_session & session);
void equip_resync(equip_session & session); // n_past from the cache

// update=shift (equip-shift.cpp): before, and after a chunk of n tokens; ranks: the positions of its tokens
std::unique_ptr<llama_kv_ledger> equip_make_shift(const equip_session_params & params);

bool equip_shift_place (equip_session & session, int32_t n, std::vector<uint32_t> & ranks); // false: no room
void equip_shift_commit(equip_session & session);
void equip_shift_fail  (equip_session & session);
int  equip_shift_rewind(equip_session & session, int32_t p0); // an enum llama_kv_rewind, or throws
bool equip_shift_context(equip_session & session, int32_t n); // context_shift: room for n tokens; false: there is none
int32_t equip_shift_kept(const equip_session & session, int32_t * pos, int32_t * slot, int32_t n_max);

void        equip_make_sampler(equip_session & session); // from session.sampling, fed with session.history
llama_token equip_sample(equip_session & session);       // throws if nothing can be sampled
void        equip_remember(equip_session & session, llama_token token);
