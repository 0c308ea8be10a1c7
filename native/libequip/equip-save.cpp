#include "equip-internal.h"

#include "llama-kv-state-io.h"

#include <algorithm>

// saved sessions: what libllama saves of the sequence, and beside it the token that is not evaluated yet and the newest tokens, for the
// penalties of a sampler. Not in it: the sampler itself, and the logits of the last token

static const uint32_t MAGIC   = 0x53535145; // "EQSS"
static const uint32_t VERSION = 1;

static equip_session & check(equip_session * session) {
    if (!session) {
        equip_fail(EQUIP_ERR_USAGE, "no session is given");
    }
    return *session;
}

[[noreturn]] static void fail(llama_kv_state_status status, const std::string & sentence) {
    const int res = status == LLAMA_KV_STATE_BUFFER ? EQUIP_ERR_USAGE : status == LLAMA_KV_STATE_MEMORY ? EQUIP_ERR_MEMORY :
        status == LLAMA_KV_STATE_UNSUPPORTED ? EQUIP_ERR_UNSUPPORTED : EQUIP_ERR_STATE;
    equip_fail(res, "%s", sentence.c_str());
}

// of the bytes that libllama was asked for: what it has refused, under a policy and without one
[[noreturn]] static void fail_llama(const equip_session & s, const char * what, const equip_log_scope & log) {
    const char * sentence = nullptr;
    const auto   status   = llama_kv_policy_state_status(&sentence);
    if (sentence && log.mentions(sentence)) {
        fail(status, sentence);
    }
    fail(LLAMA_KV_STATE_SETTINGS, equip_format("llama.cpp could not %s this session (policy %s)%s", what, s.params.policy.c_str(), log.quote().c_str()));
}

static void write_session(equip_session & s, llama_kv_state_writer & out, uint8_t * dst) {
    if (s.shift) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "a session with update=shift, which is a baseline, cannot be saved: use update=inplace");
    }
    if (s.is_lost) {
        equip_fail(EQUIP_ERR_STATE, "this session has lost what it had read and cannot be saved: reset it and read the text again");
    }

    equip_log_scope log;
    const size_t n = llama_state_seq_get_size(s.ctx, s.seq);
    if (n == 0) {
        fail_llama(s, "save", log);
    }

    out.num(MAGIC);
    out.num(VERSION);
    out.num(llama_kv_policy_model_print(s.model->model));
    out.num(s.n_shifted);
    out.num(s.pending);

    const size_t n_history = std::min(s.history.size(), EQUIP_N_HISTORY);
    out.num((uint32_t) n_history);
    out.bytes(s.history.data() + s.history.size() - n_history, n_history * sizeof(llama_token));

    out.num((uint64_t) n);
    uint8_t * to = out.room(n);
    if (to && llama_state_seq_get_data(s.ctx, to, n, s.seq) != n) {
        fail_llama(s, "save", log);
    }

    out.num(dst ? llama_kv_crc32(0, dst, out.n_bytes()) : 0u);
}

static void empty(equip_session & s) {
    equip_clear(s);
    s.pending    = LLAMA_TOKEN_NULL;
    s.has_logits = false;
    s.cancelled  = false;
    s.n_shifted  = 0;
    s.history.clear();
    equip_resync(s);
}

static void read_session(equip_session & s, const uint8_t * src, size_t size) {
    if (s.shift) {
        equip_fail(EQUIP_ERR_UNSUPPORTED, "a session with update=shift, which is a baseline, cannot be restored: use update=inplace");
    }

    llama_kv_state_reader in(src, size);
    if (in.num<uint32_t>() != MAGIC) {
        throw llama_kv_state_error(LLAMA_KV_STATE_CORRUPT, "this is no saved session");
    }
    const uint32_t version = in.num<uint32_t>();
    if (version != VERSION) {
        throw llama_kv_state_error(LLAMA_KV_STATE_VERSION, equip_format("this session was saved with version %u, and this library reads version %u: read the text again",
                version, VERSION));
    }
    if (size < sizeof(uint32_t) || llama_kv_state_reader(src + size - sizeof(uint32_t), sizeof(uint32_t)).num<uint32_t>() != llama_kv_crc32(0, src, size - sizeof(uint32_t))) {
        llama_kv_state_corrupt("its checksum is wrong, or it is truncated");
    }
    if (in.num<uint32_t>() != llama_kv_policy_model_print(s.model->model)) {
        throw llama_kv_state_error(LLAMA_KV_STATE_MODEL, "this session was saved with another model: load that one, or read the text again");
    }

    const int32_t  n_shifted = in.num<int32_t>();
    const int32_t  pending   = in.num<int32_t>();
    const uint32_t n_history = in.num<uint32_t>();

    const auto history = in.nums<llama_token>(n_history);

    const int32_t n_vocab = llama_vocab_n_tokens(s.model->vocab);
    bool ok = n_shifted >= 0 && (n_shifted == 0 || s.params.context_shift) && n_history <= EQUIP_N_HISTORY && pending >= LLAMA_TOKEN_NULL && pending < n_vocab;
    for (const llama_token token : history) {
        ok = ok && token >= 0 && token < n_vocab;
    }

    const uint64_t n = in.num<uint64_t>();
    if (!ok || in.n_left() < sizeof(uint32_t) || n != in.n_left() - sizeof(uint32_t)) {
        llama_kv_state_corrupt("its tokens or its size");
    }

    equip_log_scope   log;
    equip_abort_scope asserts;
    if (llama_state_seq_set_data(s.ctx, in.take(n), n, s.seq) != n) {
        fail_llama(s, "restore", log);
    }

    s.n_shifted = n_shifted;
    s.pending   = pending;
    s.history   = history;
    equip_resync(s);
    if (s.n_past > 0 && s.n_past < n_shifted) {
        llama_kv_state_corrupt("its positions");
    }
    if (s.sampler) {
        equip_make_sampler(s);
    }
}

// a failure leaves the session empty, and it says so until it is reset
static int load(equip_session & s, const uint8_t * src, size_t size) {
    empty(s);
    s.is_lost = true;
    try {
        read_session(s, src, size);
    } catch (...) {
        empty(s);
        throw;
    }
    s.is_lost = false;
    return EQUIP_OK;
}

template <typename F>
static int guard_state(F && f) {
    return equip_guard_status([&]() -> int {
        try {
            return f();
        } catch (const llama_kv_state_error & err) {
            fail(err.status, err.what());
        }
    });
}

static std::vector<uint8_t> save(equip_session & s) {
    llama_kv_state_writer count(nullptr, 0);
    write_session(s, count, nullptr);

    std::vector<uint8_t> res(count.n_bytes());
    llama_kv_state_writer out(res.data(), res.size());
    write_session(s, out, res.data());
    return res;
}

int equip_session_save(equip_session * session, uint8_t * buf, size_t n_buf, size_t * n_written) {
    return guard_state([&]() -> int {
        auto &     s   = check(session);
        const auto own = s.lock();
        if (!n_written) {
            equip_fail(EQUIP_ERR_USAGE, "no place for the size is given");
        }
        *n_written = 0;

        llama_kv_state_writer count(nullptr, 0);
        write_session(s, count, nullptr);
        *n_written = count.n_bytes();
        if (!buf) {
            return EQUIP_OK;
        }
        if (n_buf < count.n_bytes()) {
            equip_fail(EQUIP_ERR_USAGE, "the state needs %zu bytes and the buffer has %zu", count.n_bytes(), n_buf);
        }

        llama_kv_state_writer out(buf, n_buf);
        write_session(s, out, buf);
        *n_written = out.n_bytes();
        return EQUIP_OK;
    });
}

int equip_session_load(equip_session * session, const uint8_t * buf, size_t n_buf) {
    return guard_state([&]() -> int {
        auto &     s   = check(session);
        const auto own = s.lock();
        if (!buf) {
            equip_fail(EQUIP_ERR_USAGE, "no state is given");
        }
        return load(s, buf, n_buf);
    });
}

int equip_session_save_file(equip_session * session, const char * path) {
    return guard_state([&]() -> int {
        auto &     s   = check(session);
        const auto own = s.lock();
        if (!path) {
            equip_fail(EQUIP_ERR_USAGE, "no file is given");
        }
        llama_kv_state_replace_file(path, save(s), /*is_private =*/ true);
        return EQUIP_OK;
    });
}

int equip_session_load_file(equip_session * session, const char * path) {
    return guard_state([&]() -> int {
        auto &     s   = check(session);
        const auto own = s.lock();
        if (!path) {
            equip_fail(EQUIP_ERR_USAGE, "no file is given");
        }
        const auto data = llama_kv_state_read_file(path); // a file that cannot be read changes nothing
        return load(s, data.data(), data.size());
    });
}
