#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>

//
// llama_kv_policy
//

llama_kv_policy::llama_kv_policy(llama_kv_cache & kv, const llama_kv_policy_spec & spec, uint32_t budget) :
    kv(kv), spec(spec), ledgers(kv.n_stream, llama_kv_ledger(kv.get_size(), budget, (uint32_t) spec.sinks)) {
}

llama_kv_policy::~llama_kv_policy() = default;

bool llama_kv_policy::is_boundable(const llama_kv_cache & kv) {
    return !kv.other && kv.swa_type == LLAMA_SWA_TYPE_NONE;
}

void llama_kv_policy::attach(const llama_context & lctx) {
    this->lctx = &lctx;

    cache_positions = spec.positions == LLAMA_KV_POSITIONS_CACHE;

    if (!cache_positions) {
        return;
    }

    std::vector<llama_kv_sinks::layer> layers;
    for (const auto & layer : kv.layers) {
        layers.push_back({ layer.il, layer.k, layer.k_stream });
    }

    std::vector<float> rot;
    {
        ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead(), nullptr, true }) };

        if (const ggml_tensor * k_rot = kv.build_input_k_rot(ctx.get())) {
            rot = kv.attn_rot_hadamard.at(k_rot->ne[0]);
        }
    }

    sinks = std::make_unique<llama_kv_sinks>(kv.model, kv.hparams, std::move(layers), kv.n_stream, std::move(rot));
    sinks->attach(lctx.get_cparams());
    sinks->resize((uint32_t) spec.sinks);
}

const llama_kv_ledger & llama_kv_policy::ledger(llama_seq_id seq_id) const {
    return ledgers[kv.seq_to_stream[seq_id]];
}

llama_kv_policy::slot_info_vec_t llama_kv_policy::prepare(const std::vector<llama_ubatch> & ubatches) const {
    slot_info_vec_t res;

    for (const auto & ubatch : ubatches) {
        const uint32_t n_seqs = kv.n_stream > 1 ? ubatch.n_seqs_unq : 1;

        slot_info sinfo = { LLAMA_MAX_SEQ, 0, {}, {} };
        sinfo.resize(n_seqs);

        for (uint32_t s = 0; s < n_seqs; ++s) {
            const uint32_t strm = kv.seq_to_stream[ubatch.seq_id_unq[s]];

            // between ubatches at most `budget` slots are taken: a ubatch that fits the headroom always fits
            if (ubatch.n_tokens/n_seqs > ledgers[strm].n_slots() - ledgers[strm].budget()) {
                return {};
            }

            sinfo.s0 = std::min(sinfo.s0, strm);
            sinfo.s1 = std::max(sinfo.s1, strm);
            sinfo.strm[s] = (llama_seq_id) strm;
            sinfo.idxs[s].resize(ubatch.n_tokens/n_seqs);
        }

        res.push_back(std::move(sinfo));
    }

    return res;
}

bool llama_kv_policy::apply(slot_info & sinfo, const llama_ubatch & ubatch) {
    const int64_t t_start = ggml_time_us();

    if (broken) {
        LLAMA_LOG_ERROR("%s: the cache is inconsistent after a failed copy: clear it first\n", __func__);
        return false;
    }

    const uint32_t n = (uint32_t) sinfo.size(); // tokens per stream

    const bool captured = !captures.empty();

    captures.clear();
    inflight.clear();

    for (uint32_t s = 0; s < sinfo.n_stream(); ++s) {
        const uint32_t     strm   = (uint32_t) sinfo.strm[s];
        const llama_seq_id seq_id = ubatch.seq_id[s*n][0];
        const llama_pos    pos0   = ubatch.pos[s*n];

        auto & ledger = ledgers[strm];
        auto & cells  = kv.v_cells[strm];

        std::vector<uint32_t> victims;
        if (!ledger.place(pos0, n, sinfo.idxs[s], victims)) {
            LLAMA_LOG_ERROR("%s: %u tokens at position %d do not fit: %u of %u slots are used\n", __func__, n, pos0, ledger.n_used(), ledger.n_slots());
            return false;
        }

        // upstream's apply_ubatch purges what lies before an overwritten cell; an empty cell has nothing to purge
        for (const uint32_t slot : victims) {
            cells.rm(slot);
        }

        inflight.push_back(seq_id);

        if (sinks) {
            const int32_t n_protect = (int32_t) ledger.n_protect();

            // the sinks' distance to this ubatch: one shift for all of them
            const int32_t delta = ledger.gap();

            if (delta > 0 && n_protect > 0) {
                std::vector<uint32_t> slots(n_protect);
                for (int32_t i = 0; i < n_protect; ++i) {
                    slots[i] = (uint32_t) ledger.slot_of_first(i);
                }

                ggml_backend_sched_synchronize(lctx->get_sched());
                if (!sinks->rewrite(strm, delta, slots.data(), (uint32_t) slots.size())) {
                    LLAMA_LOG_ERROR("%s: failed to rotate the keys of the protected tokens\n", __func__);
                    return false;
                }
            }

            const int32_t rank = pos0 - ledger.pos_first();
            if (rank < n_protect) {
                captures.push_back({ strm, s*n, (uint32_t) rank, std::min<uint32_t>(n, n_protect - rank) });
            }
        } else if (!warned_far && (uint32_t) (pos0 - ledger.pos_first()) >= kv.hparams.n_ctx_train) {
            warned_far = true;
            LLAMA_LOG_WARN("%s: position %d is past the trained context of %u tokens; with positions=true the kept tokens are now further away than the model has seen\n",
                    __func__, pos0, kv.hparams.n_ctx_train);
        }
    }

    no_reuse = captured || !captures.empty();

    kv.apply_ubatch(sinfo, ubatch);

    n_steps++;
    t_host_us += ggml_time_us() - t_start;

    return true;
}

void llama_kv_policy::commit() {
    const int64_t t_start = ggml_time_us();

    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    for (const llama_seq_id seq_id : inflight) {
        const uint32_t strm = kv.seq_to_stream[seq_id];

        ledgers[strm].commit(victims, moves);

        for (const uint32_t slot : victims) {
            kv.v_cells[strm].rm(slot);
        }

        if (!moves.empty()) {
            broken = !move_rows(strm, moves) || broken;

            for (const auto & m : moves) {
                move_cell(strm, m.src, m.dst, seq_id);
            }
        }
    }

    inflight.clear();

    t_host_us += ggml_time_us() - t_start;
}

void llama_kv_policy::move_cell(uint32_t strm, uint32_t src, uint32_t dst, llama_seq_id seq_id) {
    auto & cells = kv.v_cells[strm];

    const llama_pos         pos = cells.pos_get(src);
    const llama_kv_cell_ext ext = cells.ext_get(src);

    cells.rm(src);
    cells.pos_set(dst, pos);
    cells.ext_set(dst, ext);
    cells.seq_add(dst, seq_id);
}

// backends of our own: the context's may carry the caller's abort callback, and a copy must not stop half way
ggml_backend_t llama_kv_policy::get_backend(ggml_backend_buffer_t buffer) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
    if (!dev) {
        dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    }

    auto & res = backends[dev];
    if (!res) {
        res = llama_kv_backend_init(dev, lctx->get_cparams().n_threads_batch);
    }

    return res.get();
}

// copy whole rows of K and V, byte for byte: sources lie above the budget and destinations below, so no order is needed
bool llama_kv_policy::move_rows(uint32_t strm, const std::vector<llama_kv_ledger::move> & moves) {
    struct run { uint32_t src; uint32_t dst; uint32_t n; };

    std::vector<run> runs;
    for (const auto & m : moves) {
        if (!runs.empty() && m.src == runs.back().src + runs.back().n && m.dst == runs.back().dst + runs.back().n) {
            runs.back().n++;
        } else {
            runs.push_back({ m.src, m.dst, 1 });
        }
    }

    ggml_backend_sched_synchronize(lctx->get_sched());

    std::map<ggml_backend_t, std::vector<const llama_kv_cache::kv_layer *>> by_backend;

    for (const auto & layer : kv.layers) {
        by_backend[get_backend(layer.k->buffer)].push_back(&layer);
    }

    for (const auto & [backend, layers] : by_backend) {
        // a copy is three tensors (two views and the result), and each of K and V is visited once more
        const size_t n_nodes = 2*layers.size()*(3*runs.size() + 1);

        ggml_context_ptr ctx_ptr { ggml_init({ n_nodes*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr, true }) };

        ggml_context * ctx = ctx_ptr.get();
        ggml_cgraph  * gf  = ggml_new_graph_custom(ctx, n_nodes, false);

        // quantised rows as 16-bit words: Vulkan misplaces the views of a copy between quantised types, Metal has no such copy
        const auto rows = [&](ggml_tensor * t, uint32_t slot, uint32_t n) {
            ggml_tensor * res = ggml_view_2d(ctx, t, t->ne[0], n, t->nb[1], slot*t->nb[1]);

            if (ggml_is_quantized(t->type)) {
                res->type  = GGML_TYPE_F16;
                res->ne[0] = t->nb[1]/sizeof(ggml_fp16_t);
                res->nb[0] = sizeof(ggml_fp16_t);
            }

            return res;
        };

        for (const auto * layer : layers) {
            ggml_tensor * k = layer->k_stream[strm];
            ggml_tensor * v = layer->v_stream[strm];

            for (const auto & r : runs) {
                ggml_build_forward_expand(gf, ggml_cpy(ctx, rows(k, r.src, r.n), rows(k, r.dst, r.n)));

                if (!v) {
                    continue;
                }

                if (!kv.v_trans) {
                    ggml_build_forward_expand(gf, ggml_cpy(ctx, rows(v, r.src, r.n), rows(v, r.dst, r.n)));
                } else {
                    // transposed: element j of the row is at j*n_slots + slot
                    const size_t ts = ggml_type_size(v->type);

                    ggml_build_forward_expand(gf, ggml_cpy(ctx,
                                ggml_view_2d(ctx, v, r.n, v->ne[0], v->ne[1]*ts, r.src*ts),
                                ggml_view_2d(ctx, v, r.n, v->ne[0], v->ne[1]*ts, r.dst*ts)));
                }
            }
        }

        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            if (t->view_src && !t->buffer) {
                ggml_backend_view_init(t);
            }
        }

        if (!backend || ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
            LLAMA_LOG_ERROR("%s: failed to move the kept rows\n", __func__);
            return false;
        }
    }

    return true;
}

void llama_kv_policy::capture_k(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, int32_t il) const {
    for (const auto & c : captures) {
        ggml_tensor * dst = sinks->original(ctx, il, c.strm, c.rank, c.n);

        if (dst) {
            ggml_tensor * src = ggml_view_2d(ctx, k_cur, dst->ne[0], c.n, k_cur->nb[2], c.i_tok*k_cur->nb[2]);

            ggml_build_forward_expand(gf, ggml_cpy(ctx, src, dst));
        }
    }
}

void llama_kv_policy::clear() {
    for (auto & ledger : ledgers) {
        ledger.reset();
    }

    inflight.clear();
    broken = false;
}

bool llama_kv_policy::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id < 0) {
        bool res = true;
        for (uint32_t s = 0; s < kv.n_stream; ++s) {
            res = seq_rm((llama_seq_id) s, p0, p1) && res;
        }
        return res;
    }

    const uint32_t strm = kv.seq_to_stream[seq_id];

    auto & ledger = ledgers[strm];

    p0 = std::max(p0, 0);

    if (ledger.empty() || p0 > ledger.pos_last()) {
        return true;
    }

    if (p1 >= 0 && p1 <= ledger.pos_last()) {
        LLAMA_LOG_DEBUG("%s: refused: a bounded cache drops tokens from the end only\n", __func__);
        return p1 <= ledger.pos_first() || p1 <= p0;
    }

    if (rewind_kind(seq_id, p0) == LLAMA_KV_REWIND_IMPOSSIBLE) {
        LLAMA_LOG_DEBUG("%s: refused: position %d lies at or before the newest evicted one, %d\n", __func__, p0, ledger.evicted_max());
        return false;
    }

    std::vector<uint32_t> freed;
    ledger.truncate(p0, freed);

    for (const uint32_t slot : freed) {
        // empty if the ubatch failed before upstream took note of it
        if (!kv.v_cells[strm].is_empty(slot)) {
            kv.v_cells[strm].rm(slot);
        }
    }

    inflight.erase(std::remove(inflight.begin(), inflight.end(), seq_id), inflight.end());

    return true;
}

llama_pos llama_kv_policy::seq_pos_min(llama_seq_id seq_id) const {
    const auto & l = ledger(seq_id);

    return l.empty() ? -1 : l.tail_first();
}

llama_pos llama_kv_policy::seq_pos_max(llama_seq_id seq_id) const {
    const auto & l = ledger(seq_id);

    return l.empty() ? -1 : l.pos_last();
}

llama_pos llama_kv_policy::seq_pos_min_iswa(llama_seq_id seq_id, llama_pos pos_swa) const {
    const auto & l = ledger(seq_id);

    if (l.empty()) {
        return -1;
    }

    // a rewind to p0 needs the whole window before p0 in the other cache too
    const llama_pos pos_window = pos_swa <= l.pos_first() ? l.pos_first() : pos_swa + (llama_pos) kv.hparams.n_swa - 1;

    return std::max(l.tail_first(), pos_window);
}

llama_kv_rewind llama_kv_policy::rewind_kind(llama_seq_id seq_id, llama_pos p0) const {
    const auto & l = ledger(seq_id);

    if (l.empty() || p0 > l.pos_last() || p0 <= l.pos_first()) {
        return LLAMA_KV_REWIND_EXACT;
    }

    return !l.can_rewind(p0) ? LLAMA_KV_REWIND_IMPOSSIBLE : l.rewind_exact(p0) ? LLAMA_KV_REWIND_EXACT : LLAMA_KV_REWIND_SHORTENED;
}

bool llama_kv_policy::pin(llama_seq_id seq_id, int32_t n) {
    if (n < 0) {
        return false;
    }

    auto & l = ledgers[kv.seq_to_stream[seq_id]];

    const uint32_t n_protect = std::max((uint32_t) n, (uint32_t) spec.sinks);

    // the originals of all sequences live in one block, which can grow only while none of them is needed
    const bool grow = sinks && n_protect > sinks->get_n();

    if (grow && std::any_of(ledgers.begin(), ledgers.end(), [](const auto & other) { return !other.empty(); })) {
        return false;
    }

    if (!l.set_protect(n_protect)) {
        return false;
    }

    if (grow) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        sinks->resize(n_protect);
    }

    return true;
}

bool llama_kv_policy::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return true;
    }

    const uint32_t s0 = kv.seq_to_stream[seq_id_src];
    const uint32_t s1 = kv.seq_to_stream[seq_id_dst];

    if (s0 == s1 || p0 > 0 || p1 >= 0) {
        refuse("seq_cp of a part of a sequence");
        return false;
    }

    ggml_backend_sched_synchronize(lctx->get_sched());

    ledgers[s1] = ledgers[s0];
    if (sinks) {
        sinks->copy(s0, s1);
    }

    return true;
}

void llama_kv_policy::refuse(const char * op) const {
    LLAMA_LOG_ERROR("%s: %s does nothing on a cache that is bounded by the policy %s\n", __func__, op, spec.desc->name);
}

void llama_kv_policy::check_state_write(llama_seq_id seq_id) const {
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        if ((seq_id < 0 || kv.seq_to_stream[seq_id] == s) && ledgers[s].n_evicted() > 0) {
            throw std::runtime_error("the state of a sequence with evicted tokens cannot be saved yet: save before the budget is reached, or keep the text and read it again");
        }
    }
}

void llama_kv_policy::check_state_read() const {
    throw std::runtime_error("a state cannot be restored into a bounded cache yet: read the text again");
}

//
// llama_kv_policy_scope
//

namespace {

// the policy that the next context of this thread asks for
struct choice_t {
    bool        is_set = false;
    std::string spec;
};

thread_local choice_t    choice;
thread_local std::string last_error;
thread_local std::string last_check;
thread_local bool        has_error = false;

// the policy of the context under construction
struct active_t {
    bool                 is_set = false;
    llama_kv_policy_spec spec;
    uint32_t             budget   = 0;
    uint32_t             n_ubatch = 0;
};

thread_local active_t active;

[[noreturn]] void fail(const std::string & sentence, bool from_env) {
    last_error = sentence;
    has_error  = true;

    // a program that was never written for a policy may have silenced the log
    if (from_env) {
        fprintf(stderr, "LLAMA_KV_POLICY: %s\n", sentence.c_str());
    }

    throw std::runtime_error(sentence);
}

bool has_no_rope(const llama_hparams & hparams) {
    return hparams.use_alibi || hparams.rope_type == LLAMA_ROPE_TYPE_NONE;
}

}

llama_kv_policy_scope::llama_kv_policy_scope(const llama_model & model, const llama_cparams & cparams, llama_memory_params & params) {
    const char * env = getenv("LLAMA_KV_POLICY");

    const bool from_env = !choice.is_set;

    active    = {};
    has_error = false;

    const std::string text = !from_env ? choice.spec : env && *env ? env : "none";

    try {
        active.spec = llama_kv_policy_parse(text);
    } catch (const std::exception & err) {
        fail(err.what(), from_env);
    }

    auto & spec = active.spec;

    // draft and other helper contexts are not what the user asked to bound
    if (!spec.desc || cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || cparams.ctx_other) {
        return;
    }

    const auto & hparams = model.hparams;

    if (cparams.kv_unified && cparams.n_seq_max > 1) {
        fail("a bounded cache holds one sequence per stream, but " + std::to_string(cparams.n_seq_max) +
             " sequences share one: start with -np 1, or with -np N --no-kv-unified.", from_env);
    }

    if (hparams.n_pos_per_embd() > 1) {
        fail("this model uses M-RoPE positions, which no policy supports yet: use the policy none.", from_env);
    }

    if (spec.positions == LLAMA_KV_POSITIONS_DEFAULT) {
        spec.positions = has_no_rope(hparams) || hparams.is_mla() ? LLAMA_KV_POSITIONS_TRUE : LLAMA_KV_POSITIONS_CACHE;
    } else if (spec.positions == LLAMA_KV_POSITIONS_CACHE && has_no_rope(hparams)) {
        fail("this model has no rotary positions, so positions=cache is not possible: use positions=true.", from_env);
    } else if (spec.positions == LLAMA_KV_POSITIONS_CACHE && hparams.is_mla()) {
        fail("this model has multi-head latent attention, which positions=cache does not support yet: use positions=true.", from_env);
    }

    int64_t budget = spec.budget;
    if (budget <= 0) {
        budget = budget == 0 ? hparams.n_ctx_train : std::min<int64_t>(hparams.n_ctx_train, 4096);
    }

    if (budget < spec.sinks + 2) {
        fail("the budget of " + std::to_string(budget) + " tokens is too small: " + std::to_string(spec.sinks) +
             " sinks and one recent token beside the new one need at least " + std::to_string(spec.sinks + 2) + ".", from_env);
    }

    // a sequence never grows past n_ctx, so more slots than that would stay empty
    if (budget > cparams.n_ctx_seq) {
        LLAMA_LOG_WARN("%s: the budget of %d tokens is lowered to the context size of %u\n", __func__, (int) budget, cparams.n_ctx_seq);
        budget = cparams.n_ctx_seq;
    }

    active.is_set   = true;
    active.budget   = (uint32_t) budget;
    active.n_ubatch = cparams.n_ubatch;

    // a full-size sliding-window cache would grow with n_ctx
    params.swa_full = false;
}

llama_kv_policy_scope::~llama_kv_policy_scope() {
    active = {};
}

static llama_kv_policy * get_policy(llama_memory_i * memory) {
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return iswa->get_base()->get_policy();
    }

    auto * kv = dynamic_cast<llama_kv_cache *>(memory);

    return kv ? kv->get_policy() : nullptr;
}

void llama_kv_policy_scope::attach(llama_memory_i * memory, const llama_context & lctx) const {
    if (!active.is_set) {
        return;
    }

    if (!memory) {
        LLAMA_LOG_WARN("%s: the policy %s is ignored: this model has no KV cache\n", __func__, active.spec.desc->name);
        return;
    }

    llama_kv_policy * policy = get_policy(memory);

    if (!policy) {
        fail("this model's memory (recurrent, hybrid or sparse attention) cannot be bounded yet: use the policy none.", !choice.is_set);
    }

    policy->attach(lctx);

    // a warning, so that a program that hides information shows it
    LLAMA_LOG_WARN("%s: KV cache bounded: policy %s, budget %u tokens, sinks %d, positions %s\n", __func__,
            active.spec.desc->name, active.budget, (int) active.spec.sinks, policy->is_cache_positions() ? "cache" : "true");
}

bool llama_kv_policy_from_env() {
    const char * env = getenv("LLAMA_KV_POLICY");

    return env && *env && strcmp(env, "none") != 0;
}

size_t llama_kv_policy_state_failed(llama_memory_i * memory, size_t size) {
    return size == 0 && get_policy(memory) ? SIZE_MAX : 0;
}

uint32_t llama_kv_policy_n_slots(uint32_t kv_size, llama_swa_type swa_type, bool shared) {
    if (!active.is_set || swa_type != LLAMA_SWA_TYPE_NONE || shared) {
        return kv_size;
    }

    return GGML_PAD(active.budget + active.n_ubatch, 256u);
}

std::unique_ptr<llama_kv_policy> llama_kv_policy_make(llama_kv_cache & kv) {
    if (!active.is_set || !llama_kv_policy::is_boundable(kv)) {
        return nullptr;
    }

    return std::make_unique<llama_kv_policy>(kv, active.spec, active.budget);
}

//
// C API
//

static llama_kv_policy * get_policy(const llama_context * ctx) {
    return ctx ? get_policy(ctx->get_memory()) : nullptr;
}

static bool seq_ok(const llama_context * ctx, llama_seq_id seq_id) {
    return seq_id >= 0 && (uint32_t) seq_id < ctx->get_cparams().n_seq_max;
}

void llama_kv_policy_set_next(const char * spec) {
    choice.is_set = spec != nullptr;
    choice.spec   = spec ? spec : "";
}

static std::string join(const std::vector<const char *> & names) {
    std::string res;
    for (const char * name : names) {
        res += (res.empty() ? "" : "|") + std::string(name);
    }
    return res;
}

const char * llama_kv_policy_describe(int32_t i) {
    static const std::vector<std::string> text = [] {
        std::vector<std::string> res;
        for (const auto & desc : llama_kv_policy_registry()) {
            res.push_back(std::string(desc.name) + ":scope=" + join(desc.scopes) + ",positions=" + join(desc.positions) +
                    ",update=" + join(desc.updates) + ",recent=" + (desc.takes_recent ? "1" : "0"));
        }
        return res;
    }();

    return i >= 0 && (size_t) i < text.size() ? text[i].c_str() : nullptr;
}

int32_t llama_kv_policy_n_swa(const llama_model * model) {
    return model ? (int32_t) model->hparams.n_swa : 0;
}

bool llama_kv_policy_get_layer(const llama_model * model, int32_t il, llama_kv_policy_layer * layer) {
    if (!model || !layer || il < 0 || il >= (int32_t) model->hparams.n_layer_all) {
        return false;
    }

    const auto & hparams = model->hparams;
    const bool   has_kv  = hparams.has_kv(il) && !hparams.is_recr(il) && hparams.n_head_kv(il) > 0;

    layer->n_embd_k  = has_kv ? hparams.n_embd_k_gqa(il) : 0;
    layer->n_embd_v  = has_kv && !hparams.is_mla() ? hparams.n_embd_v_gqa(il) : 0;
    layer->n_head_kv = has_kv ? hparams.n_head_kv(il) : 0;
    layer->is_swa    = hparams.is_swa(il);

    return true;
}

const char * llama_kv_policy_check(const char * spec) {
    try {
        llama_kv_policy_parse(spec ? spec : "");
    } catch (const std::exception & err) {
        last_check = err.what();
        return last_check.c_str();
    }

    return nullptr;
}

const char * llama_kv_policy_error(void) {
    return has_error ? last_error.c_str() : nullptr;
}

const char * llama_kv_policy_name(const llama_context * ctx) {
    const auto * policy = get_policy(ctx);

    return policy ? policy->get_spec().desc->name : "none";
}

bool llama_kv_policy_get_stats(const llama_context * ctx, llama_seq_id seq_id, llama_kv_policy_stats * stats) {
    const auto * policy = get_policy(ctx);

    if (!policy || !stats || !seq_ok(ctx, seq_id)) {
        return false;
    }

    const auto & l = policy->ledger(seq_id);

    stats->n_evicted = l.n_evicted();
    stats->n_used    = (int32_t) l.n_used();
    stats->n_slots   = (int32_t) l.n_slots();
    stats->budget    = (int32_t) l.budget();
    stats->n_protect = (int32_t) l.n_protect();
    stats->t_host_us = policy->t_host_us;
    stats->n_steps   = policy->n_steps;

    return true;
}

int32_t llama_kv_policy_get_kept(const llama_context * ctx, llama_seq_id seq_id, llama_pos * pos, int32_t * slot, int32_t n_max) {
    if (!ctx || !seq_ok(ctx, seq_id)) {
        return 0;
    }

    auto * memory = ctx->get_memory();
    auto * iswa   = dynamic_cast<llama_kv_cache_iswa *>(memory);
    auto * kv     = iswa ? iswa->get_base() : dynamic_cast<llama_kv_cache *>(memory);

    if (!kv) {
        return 0;
    }

    int32_t n = 0;
    for (const auto & [p, i] : kv->get_cells(seq_id).seq_pos_get(seq_id)) {
        if (n < n_max) {
            if (pos) {
                pos[n] = p;
            }
            if (slot) {
                slot[n] = (int32_t) i;
            }
        }
        n++;
    }

    return n;
}

enum llama_kv_rewind llama_kv_policy_rewind_kind(const llama_context * ctx, llama_seq_id seq_id, llama_pos p0) {
    const auto * policy = get_policy(ctx);

    if (!policy || !seq_ok(ctx, seq_id)) {
        return LLAMA_KV_REWIND_EXACT;
    }

    // the sliding-window cache may be the one that cannot go back
    const llama_pos pos_min = ctx->get_memory()->seq_pos_min(seq_id);

    if (p0 > policy->ledger(seq_id).pos_first() && p0 < pos_min && p0 <= policy->ledger(seq_id).pos_last()) {
        return LLAMA_KV_REWIND_IMPOSSIBLE;
    }

    return policy->rewind_kind(seq_id, p0);
}

bool llama_kv_policy_pin(llama_context * ctx, llama_seq_id seq_id, int32_t n) {
    auto * policy = get_policy(ctx);

    return policy && seq_ok(ctx, seq_id) && policy->pin(seq_id, n);
}

bool llama_kv_policy_cache_positions(const llama_context * ctx) {
    const auto * policy = get_policy(ctx);

    return policy && policy->is_cache_positions();
}

bool llama_kv_policy_flash_attn(const llama_context * ctx) {
    return ctx->get_cparams().flash_attn;
}

int64_t llama_kv_policy_graph_us(const llama_context * ctx) {
    return ctx->get_graph_us();
}
