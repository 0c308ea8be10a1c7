#include "llama-kv-state.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-policy-impl.h"
#include "llama-kv-state-rows.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>

static constexpr uint32_t MAGIC     = 0x4b495145; // "EQIK"
static constexpr uint32_t VERSION   = 1;
static constexpr uint32_t MAGIC_SEQ = 0xaf143cd8; // upstream's, before the state of one sequence

static constexpr const char * UNDER = " under the policy "; // in place of the bare architecture: upstream's own reader refuses it by that

//
// the last refusal
//

namespace {

struct refusal_t {
    llama_kv_state_status status = LLAMA_KV_STATE_OK;
    std::string           sentence;
};

thread_local refusal_t last;

}

enum llama_kv_state_status llama_kv_policy_state_status(const char ** sentence) {
    if (sentence) {
        *sentence = last.status == LLAMA_KV_STATE_OK ? nullptr : last.sentence.c_str();
    }
    return last.status;
}

// f() or def, and what went wrong
template <typename F, typename G>
static size_t guarded(const char * what, F && f, G && on_failure) {
    last = {};
    try {
        return f();
    } catch (const llama_kv_state_error & err) {
        last = { err.status, err.what() };
    } catch (const std::exception &) {
        last = { LLAMA_KV_STATE_MEMORY, "there is not enough memory for this state" };
    }
    LLAMA_LOG_ERROR("llama_state: %s: %s\n", what, last.sentence.c_str());

    return on_failure();
}

//
// the model
//

// what tells two models apart: architecture, names and shapes of all tensors, and for each of them the checksum of a few weights
// packed: of a tensor that is laid out for this processor, so that a state from another one cannot be compared in it
namespace {

struct fingerprint {
    uint32_t shape = 0;

    std::vector<uint8_t>  kinds;  // [n_tensors] 0: cannot be read, 1: as in the file, 2: packed
    std::vector<uint32_t> hashes; // [n_tensors]
};

}

static uint8_t kind_of(const ggml_tensor * t) {
    if (!t->buffer || !t->data) {
        return 0;
    }

    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(t->buffer);
    ggml_backend_dev_t         dev  = ggml_backend_buft_get_device(buft);

    if (ggml_backend_buft_is_host(buft)) {
        return 1;
    }
    if (!dev) {
        return 0;
    }
    if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return 2; // repacked: in host memory all the same, but not to be read back
    }

    // tensors that are split over devices are read as a whole only
    return ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_META && ggml_backend_dev_buffer_type(dev) == buft ? 1 : 0;
}

static fingerprint make_fingerprint(const llama_model & model) {
    static constexpr size_t N_SAMPLES = 16;
    static constexpr size_t N_BYTES   = 32;

    fingerprint res;

    const auto add = [&](const void * data, size_t n) { res.shape = llama_kv_crc32(res.shape, (const uint8_t *) data, n); };

    const std::string arch = llm_arch_name(model.arch);
    add(arch.data(), arch.size());
    add(&model.hparams.n_layer_all, sizeof(model.hparams.n_layer_all));
    add(&model.hparams.n_embd,      sizeof(model.hparams.n_embd));

    const uint32_t n_vocab = model.vocab.n_tokens();
    add(&n_vocab, sizeof(n_vocab));

    for (const auto & [name, t] : model.tensors_by_name) {
        add(name.data(), name.size());
        add(&t->type, sizeof(t->type));
        add(t->ne, sizeof(t->ne));

        const uint8_t kind = kind_of(t);
        const size_t  size = ggml_nbytes(t);

        uint32_t hash = 0;
        for (size_t i = 0; i < N_SAMPLES && kind > 0 && size >= N_BYTES; ++i) {
            const size_t offs = (size - N_BYTES)/(N_SAMPLES - 1)*i;

            uint8_t buf[N_BYTES];
            if (kind == 2) {
                memcpy(buf, (const uint8_t *) t->data + offs, sizeof(buf));
            } else {
                ggml_backend_tensor_get(t, buf, offs, sizeof(buf));
            }
            hash = llama_kv_crc32(hash, buf, sizeof(buf));
        }

        res.kinds .push_back(kind);
        res.hashes.push_back(hash);
    }

    return res;
}

static void write_fingerprint(llama_kv_state_writer & out, const fingerprint & f) {
    out.num(f.shape);
    out.num((uint32_t) f.kinds.size());
    out.nums(f.kinds);
    out.nums(f.hashes);
}

static fingerprint read_fingerprint(llama_kv_state_reader & in) {
    fingerprint res;

    res.shape = in.num<uint32_t>();

    const uint32_t n = in.num<uint32_t>();
    res.kinds  = in.nums<uint8_t>(n);
    res.hashes = in.nums<uint32_t>(n);

    if (std::any_of(res.kinds.begin(), res.kinds.end(), [](uint8_t kind) { return kind > 2; })) {
        llama_kv_state_corrupt("the model's weights");
    }

    return res;
}

static bool is_same_model(const fingerprint & a, const fingerprint & b) {
    bool res = a.shape == b.shape && a.kinds.size() == b.kinds.size();

    for (size_t i = 0; i < a.kinds.size() && res; ++i) {
        res = a.kinds[i] != b.kinds[i] || a.hashes[i] == b.hashes[i];
    }

    return res;
}

uint32_t llama_kv_policy_model_print(const llama_model * model) {
    try {
        const auto f = make_fingerprint(*model);
        return llama_kv_crc32(f.shape, (const uint8_t *) f.hashes.data(), f.hashes.size()*sizeof(uint32_t));
    } catch (const std::exception &) {
        return 0; // no memory: a print that no model has is told by the caller's next step
    }
}

//
// the settings
//

static std::vector<std::pair<std::string, std::string>> split_settings(const std::string & text) {
    std::vector<std::pair<std::string, std::string>> res;

    for (size_t i = 0; i < text.size();) {
        const size_t end = std::min(text.find(',', i), text.size());
        const size_t eq  = std::min(text.find('=', i), end);

        res.push_back({ text.substr(i, eq - i), eq < end ? text.substr(eq + 1, end - eq - 1) : "" });
        i = end + 1;
    }

    return res;
}

static std::string value_of(const std::vector<std::pair<std::string, std::string>> & settings, const std::string & key) {
    for (const auto & [k, v] : settings) {
        if (k == key) {
            return v;
        }
    }
    return "";
}

static void check_settings(const std::string & theirs, const std::string & ours) {
    if (theirs == ours) {
        return;
    }

    const auto a = split_settings(theirs);
    const auto b = split_settings(ours);

    // the first one in the order of ours, else one that we do not have
    for (const auto * list : { &b, &a }) {
        for (const auto & [key, value] : *list) {
            (void) value;
            const std::string va = value_of(a, key);
            const std::string vb = value_of(b, key);
            if (va != vb) {
                throw llama_kv_state_error(LLAMA_KV_STATE_SETTINGS, "this state was saved with " + key + "=" + (va.empty() ? "(not set)" : va) +
                        ", and this context has " + key + "=" + (vb.empty() ? "(not set)" : vb) + ": use the same, or read the text again");
            }
        }
    }
    throw llama_kv_state_error(LLAMA_KV_STATE_SETTINGS, "this state was saved with other settings: read the text again");
}

//
// the recurrent part of a hybrid memory: all snapshots of the sequence's one cell
//

static std::vector<const ggml_tensor *> recurrent_tensors(const llama_memory_recurrent & recr) {
    std::vector<const ggml_tensor *> res;
    for (const auto * list : { &recr.r_l, &recr.p_l, &recr.s_l }) {
        for (const ggml_tensor * t : *list) {
            if (t) {
                res.push_back(t);
            }
        }
    }
    return res;
}

static std::vector<uint32_t> recurrent_rows(const llama_memory_recurrent & recr, uint32_t cell) {
    std::vector<uint32_t> res;
    for (uint32_t i = 0; i <= recr.n_rs_seq; ++i) {
        res.push_back(i*recr.size + cell);
    }
    return res;
}

static void write_recurrent(llama_kv_state_writer & out, const llama_memory_recurrent & recr, llama_seq_id seq_id) {
    const int32_t tail = recr.cells[seq_id].tail;

    out.num((uint8_t) (tail >= 0));
    if (tail < 0) {
        return;
    }

    const auto & cell = recr.cells[tail];

    out.num(cell.pos);
    out.num(recr.rs_idx.empty() ? 0u : recr.rs_idx[seq_id]);

    for (const ggml_tensor * t : recurrent_tensors(recr)) {
        llama_kv_state_write_rows(out, t, 0, recurrent_rows(recr, cell.src >= 0 ? cell.src : tail));
    }
}

static void read_recurrent(llama_kv_state_reader & in, llama_memory_recurrent & recr, llama_seq_id seq_id, llama_pos pos_last, bool is_check) {
    const bool any = in.flag();

    if (any != (pos_last >= 0)) {
        llama_kv_state_corrupt("the recurrent state");
    }
    if (!any) {
        return;
    }

    const llama_pos pos    = in.num<llama_pos>();
    const uint32_t  rs_idx = in.num<uint32_t>();

    if (pos != pos_last || rs_idx > recr.n_rs_seq) {
        llama_kv_state_corrupt("the recurrent state");
    }

    uint32_t i = 0;
    if (!is_check) {
        while (i < recr.size && !recr.cells[i].is_empty()) {
            i++;
        }
        if (i == recr.size) {
            throw llama_kv_state_error(LLAMA_KV_STATE_SEQUENCE, "no recurrent state is free");
        }

        auto & cell = recr.cells[i];
        cell.pos  = pos;
        cell.src  = (int32_t) i;
        cell.src0 = (int32_t) i;
        cell.seq_id.insert(seq_id);

        recr.cells[seq_id].tail = (int32_t) i;
        recr.used++;
        if (!recr.rs_idx.empty()) {
            recr.rs_idx[seq_id] = rs_idx;
        }
    }

    for (const ggml_tensor * t : recurrent_tensors(recr)) {
        llama_kv_state_read_rows(in, const_cast<ggml_tensor *>(t), 0, recurrent_rows(recr, i), is_check);
    }
}

//
// the envelope
//

namespace {

// a bounded context and the parts of its memory
struct bounded {
    llama_context & lctx;

    llama_memory_i         * memory;
    llama_kv_policy        * policy;
    llama_kv_cache         * swa;
    llama_memory_recurrent * recr;

    explicit bounded(llama_context & lctx) : lctx(lctx), memory(lctx.get_memory()),
        policy(llama_kv_policy_of(memory)), swa(llama_kv_policy_swa(memory)), recr(llama_kv_policy_recr(memory)) {}

    std::vector<llama_seq_id> seq_ids(llama_seq_id seq_id) const {
        std::vector<llama_seq_id> res;
        for (uint32_t s = 0; s < policy->n_seq(); ++s) {
            if (seq_id == -1 || seq_id == (llama_seq_id) s) {
                res.push_back((llama_seq_id) s);
            }
        }
        if (res.empty()) {
            throw llama_kv_state_error(LLAMA_KV_STATE_SEQUENCE, "this context has no sequence " + std::to_string(seq_id));
        }
        return res;
    }
};

}

static void check_flags(llama_state_seq_flags flags) {
    // PARTIAL_ONLY: what cannot go back by itself, which in a bounded memory is all of it
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        throw llama_kv_state_error(LLAMA_KV_STATE_UNSUPPORTED, "the state of a bounded cache cannot stay on the device: save it to host memory");
    }
}

// once per model and context; the text is checked by what the caller has locked: a context belongs to one thread at a time
static const fingerprint & fingerprint_of(const bounded & b) {
    auto & cached = b.policy->state_model;
    if (!cached) {
        cached = std::make_shared<fingerprint>(make_fingerprint(b.lctx.get_model()));
    }
    return *std::static_pointer_cast<const fingerprint>(cached);
}

// in front of the state of all sequences
static std::string name_of(const bounded & b) {
    return llm_arch_name(b.lctx.get_model().arch) + std::string(UNDER) + b.policy->get_spec().desc->name;
}

// base: where the checksum begins
static void write_state(const bounded & b, llama_seq_id seq_id, llama_kv_state_writer & out, uint8_t * base) {
    const auto ids = b.seq_ids(seq_id);
    for (const llama_seq_id s : ids) {
        b.policy->state_check_write(s);
    }

    if (seq_id < 0) {
        out.text(name_of(b));
    }

    const size_t i_begin = out.n_bytes();

    out.num(MAGIC);
    out.num(VERSION);

    uint8_t * p_size = out.room(sizeof(uint64_t)); // of the envelope, checksum included

    write_fingerprint(out, fingerprint_of(b));
    out.text(b.policy->state_settings());

    out.num((uint32_t) ids.size());
    for (const llama_seq_id s : ids) {
        b.policy->state_write(out, s);
        if (b.recr) {
            write_recurrent(out, *b.recr, s);
        }
    }

    const uint64_t size = out.n_bytes() - i_begin + sizeof(uint32_t);

    uint32_t crc = 0;
    if (p_size) {
        memcpy(p_size, &size, sizeof(size));
        crc = llama_kv_crc32(0, base, out.n_bytes());
    }
    out.num(crc);
}

// without seq_id, the text of a whole state; base: where the checksum begins; leaves the reader behind the settings
static std::string read_header(llama_kv_state_reader & in, llama_seq_id seq_id, const uint8_t * base, fingerprint & model, size_t & n_end) {
    const auto not_ours = []() {
        throw llama_kv_state_error(LLAMA_KV_STATE_SETTINGS, "this is no state of a bounded cache, and this context's cache is bounded: "
                "what was saved without a policy cannot be restored under one: read the text again");
    };

    if (seq_id < 0 && in.text().find(UNDER) == std::string::npos) {
        not_ours();
    }

    const size_t i_begin = in.n_bytes();

    if (in.num<uint32_t>() != MAGIC) {
        not_ours();
    }
    const uint32_t version = in.num<uint32_t>();
    if (version != VERSION) {
        throw llama_kv_state_error(LLAMA_KV_STATE_VERSION, "this state has version " + std::to_string(version) + ", and this library reads version " +
                std::to_string(VERSION) + ": read the text again");
    }

    const uint64_t size   = in.num<uint64_t>();
    const size_t   n_head = in.n_bytes() - i_begin;

    if (size < n_head + sizeof(uint32_t)) {
        llama_kv_state_corrupt("its size");
    }
    llama_kv_state_reader ahead = in;
    ahead.take(size - n_head - sizeof(uint32_t));

    const size_t   n_summed = ahead.n_bytes();
    const uint32_t crc      = ahead.num<uint32_t>();
    if (crc != llama_kv_crc32(0, base, n_summed)) {
        llama_kv_state_corrupt("its checksum is wrong");
    }

    // nothing behind that is read, not even by a state that says so
    n_end = ahead.n_bytes();
    in    = llama_kv_state_reader(base, n_summed);
    in.take(i_begin + n_head);

    model = read_fingerprint(in);

    return in.text();
}

// everything is checked, then everything is changed; returns where the envelope ends, from base on; n_file: where it has to end, or 0
static size_t read_state(llama_context & lctx, llama_seq_id seq_id, llama_kv_state_reader in, const uint8_t * base, size_t n_file) {
    const bounded b(lctx);

    fingerprint model;
    size_t      n_end = 0;

    if (!b.policy) {
        const auto settings = split_settings(read_header(in, seq_id, base, model, n_end));
        throw llama_kv_state_error(LLAMA_KV_STATE_SETTINGS, "this state was saved under the policy " + value_of(settings, "policy") +
                " (budget " + value_of(settings, "budget") + "), and this context has none: use the same policy, or read the text again");
    }

    const auto ids      = b.seq_ids(seq_id);
    const auto at_name  = in;
    const auto settings = read_header(in, seq_id, base, model, n_end);

    if (!is_same_model(model, fingerprint_of(b))) {
        throw llama_kv_state_error(LLAMA_KV_STATE_MODEL, "this state was saved with another model: load that one, or read the text again");
    }
    check_settings(settings, b.policy->state_settings());

    if (in.num<uint32_t>() != ids.size()) {
        llama_kv_state_corrupt("the number of sequences");
    }
    if (seq_id < 0 && llama_kv_state_reader(at_name).text() != name_of(b)) {
        llama_kv_state_corrupt("its name");
    }
    if (n_file > 0 && n_end != n_file) {
        llama_kv_state_corrupt("the file is longer than the state");
    }

    // what the cache does not have yet before its first token
    b.policy->state_reserve(0);

    uint32_t n_protect = 0;

    for (const bool is_check : { true, false }) {
        if (!is_check) {
            b.policy->state_reserve(n_protect);
            lctx.memory_update(false); // copies of sequences that wait for the next step
            for (const llama_seq_id s : ids) {
                b.memory->seq_rm(s, -1, -1);
            }
        }

        llama_kv_state_reader part = in;
        for (const llama_seq_id s : ids) {
            llama_pos pos_last = -1;

            n_protect = std::max(n_protect, b.policy->state_read(part, s, b.swa, is_check, pos_last));
            if (b.recr) {
                read_recurrent(part, *b.recr, s, pos_last, is_check);
            }
        }
        if (part.n_left() != 0) {
            llama_kv_state_corrupt("there is more than belongs to it");
        }
    }

    return n_end;
}

static void poison(llama_context & lctx, llama_seq_id seq_id) {
    llama_kv_policy_poison(lctx.get_memory(), seq_id);
}

//
// llama_context's functions
//

size_t llama_kv_state_get(llama_context & lctx, llama_seq_id seq_id, uint8_t * dst, size_t size, llama_state_seq_flags flags) {
    return guarded("not saved", [&]() {
        const bounded b(lctx);

        check_flags(flags);

        if (dst) {
            lctx.memory_update(false); // copies of sequences that wait for the next step
        }

        llama_kv_state_writer out(dst, size);
        if (seq_id >= 0) {
            out.num(MAGIC_SEQ);
            out.num(seq_id);
        }
        write_state(b, seq_id, out, dst);

        return out.n_bytes();
    }, []() { return (size_t) 0; });
}

bool llama_kv_state_owns(const llama_context & lctx, llama_seq_id seq_id, const uint8_t * src, size_t size) {
    if (llama_kv_policy_of(lctx.get_memory())) {
        return true;
    }

    try {
        llama_kv_state_reader in(src, size);
        if (seq_id < 0) {
            return in.text().find(UNDER) != std::string::npos && in.num<uint32_t>() == MAGIC;
        }
        return in.num<uint32_t>() == MAGIC_SEQ && in.take(sizeof(llama_seq_id)) && in.num<uint32_t>() == MAGIC;
    } catch (const std::exception &) {
        return false; // upstream's reader says what is wrong
    }
}

size_t llama_kv_state_set(llama_context & lctx, llama_seq_id seq_id, const uint8_t * src, size_t size, llama_state_seq_flags flags) {
    return guarded("not restored", [&]() {
        check_flags(flags);

        llama_kv_state_reader in(src, size);
        if (seq_id >= 0) {
            if (in.num<uint32_t>() != MAGIC_SEQ) {
                llama_kv_state_corrupt("its first bytes");
            }
            in.take(sizeof(seq_id)); // it may go to another one
        }
        return read_state(lctx, seq_id, in, src, 0);
    }, [&]() {
        poison(lctx, seq_id);
        return size == 0 ? SIZE_MAX : (size_t) 0;
    });
}

static constexpr uint32_t file_magic  (llama_seq_id seq_id) { return seq_id < 0 ? LLAMA_SESSION_MAGIC   : LLAMA_STATE_SEQ_MAGIC; }
static constexpr uint32_t file_version(llama_seq_id seq_id) { return seq_id < 0 ? LLAMA_SESSION_VERSION : LLAMA_STATE_SEQ_VERSION; }

size_t llama_kv_state_save(llama_context & lctx, llama_seq_id seq_id, const char * path, const llama_token * tokens, size_t n_tokens) {
    return guarded("not saved", [&]() {
        const bounded b(lctx);

        lctx.memory_update(false);

        std::vector<uint8_t> data;

        for (const bool is_count : { true, false }) {
            llama_kv_state_writer out(is_count ? nullptr : data.data(), data.size());

            out.num(file_magic(seq_id));
            out.num(file_version(seq_id));
            out.num((uint32_t) n_tokens);
            out.bytes(tokens, n_tokens*sizeof(llama_token));
            write_state(b, seq_id, out, is_count ? nullptr : data.data());

            data.resize(out.n_bytes());
        }

        llama_kv_state_replace_file(path, data);

        return data.size();
    }, []() { return (size_t) 0; });
}

bool llama_kv_state_owns_file(const llama_context & lctx, const char * path) {
    if (llama_kv_policy_of(lctx.get_memory())) {
        return true;
    }

    try {
        const auto head = llama_kv_state_read_file(path, 3*sizeof(uint32_t));

        llama_kv_state_reader in(head.data(), head.size());
        const bool     is_seq   = in.num<uint32_t>() == LLAMA_STATE_SEQ_MAGIC;
        const uint32_t version  = in.num<uint32_t>();
        const uint64_t n_tokens = in.num<uint32_t>();

        if (version != file_version(is_seq ? 0 : -1)) {
            return false;
        }

        // behind the tokens: few files are longer than these bytes by chance
        const auto more = llama_kv_state_read_file(path, 3*sizeof(uint32_t) + n_tokens*sizeof(llama_token) + 256);

        llama_kv_state_reader rest(more.data(), more.size());
        rest.take(3*sizeof(uint32_t) + n_tokens*sizeof(llama_token));

        return (is_seq || rest.text().find(UNDER) != std::string::npos) && rest.num<uint32_t>() == MAGIC;
    } catch (const std::exception &) {
        return false; // upstream's reader says what is wrong
    }
}

size_t llama_kv_state_load(llama_context & lctx, llama_seq_id seq_id, const char * path, llama_token * tokens, size_t n_max, size_t * n_tokens) {
    return guarded("not restored", [&]() {
        const auto data = llama_kv_state_read_file(path);

        llama_kv_state_reader in(data.data(), data.size());
        if (in.num<uint32_t>() != file_magic(seq_id) || in.num<uint32_t>() != file_version(seq_id)) {
            throw llama_kv_state_error(LLAMA_KV_STATE_CORRUPT, std::string(path) + " is no file of a saved state" + (seq_id < 0 ? "" : " of one sequence"));
        }

        const uint32_t n = in.num<uint32_t>();
        if (n > in.n_left()/sizeof(llama_token)) {
            llama_kv_state_corrupt("the number of tokens");
        }
        if (n > n_max) {
            throw llama_kv_state_error(LLAMA_KV_STATE_BUFFER, "the file holds " + std::to_string(n) + " tokens, and there is room for " + std::to_string(n_max));
        }
        const auto list = in.nums<llama_token>(n);

        read_state(lctx, seq_id, in, data.data(), data.size());

        std::copy(list.begin(), list.end(), tokens);
        *n_tokens = n;

        return data.size();
    }, [&]() {
        poison(lctx, seq_id);
        return (size_t) 0;
    });
}
