#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-move.h"
#include "llama-kv-rotate.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

//
// llama_kv_policy
//

llama_kv_policy::llama_kv_policy(llama_kv_cache & kv, const llama_kv_policy_spec & spec, uint32_t budget) :
    kv(kv), spec(spec),
    ledgers(kv.n_stream, llama_kv_ledger(kv.get_size(), budget, (uint32_t) spec.sinks, spec.n_recent(budget),
                spec.desc->victim && !spec.has_rule() ? spec.desc->victim() : nullptr, spec.update == LLAMA_KV_UPDATE_GATHER)),
    unrotated(kv.n_stream, false), conditions(kv.n_stream) {
}

llama_kv_policy::~llama_kv_policy() = default;

bool llama_kv_policy::is_boundable(const llama_kv_cache & kv) {
    return !kv.other && kv.swa_type == LLAMA_SWA_TYPE_NONE;
}

std::vector<llama_kv_layer> llama_kv_policy::layers_of(const llama_kv_cache & kv) {
    std::vector<llama_kv_layer> res;
    for (const auto & layer : kv.layers) {
        res.push_back({ layer.il, layer.k, layer.v, layer.k_stream, layer.v_stream, kv.hparams.n_head(layer.il), kv.hparams.n_head_kv(layer.il) });
    }
    return res;
}

// the matrix that attention may multiply the keys, or the values, with before it stores them
std::vector<float> llama_kv_policy::hadamard_of(const llama_kv_cache & kv, bool of_v) {
    ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead(), nullptr, true }) };

    const ggml_tensor * rot = of_v ? kv.build_input_v_rot(ctx.get()) : kv.build_input_k_rot(ctx.get());

    return rot ? kv.attn_rot_hadamard.at(rot->ne[0]) : std::vector<float>();
}

void llama_kv_policy::attach(const llama_context & lctx, const llama_kv_cache * kv_swa) {
    const auto & cparams = lctx.get_cparams();

    this->lctx   = &lctx;
    this->kv_swa = kv_swa;

    layers   = layers_of(kv);
    backends = std::make_unique<llama_kv_backends>(cparams.n_threads_batch);

    backends_pins  = std::make_unique<llama_kv_backends>(cparams.n_threads_batch);
    backends_turns = std::make_unique<llama_kv_backends>(cparams.n_threads_batch);

    if (spec.has_rule() && !layers.empty()) {
        rule = spec.make_rule();

        const std::string scope = spec.get_scope();

        llama_kv_scores::params p;
        p.scope       = scope == "token" ? LLAMA_KV_SCOPE_TOKEN : scope == "layer" ? LLAMA_KV_SCOPE_LAYER : LLAMA_KV_SCOPE_HEAD;
        p.n_queries   = score_queries() > 0 ? (uint32_t) score_queries() : UINT32_MAX;
        p.evict_every = evict_every();
        p.eager       = spec.desc->eager || rule->needs().page_size > 0;
        p.compact     = spec.update == LLAMA_KV_UPDATE_GATHER;
        p.v_trans     = kv.v_trans;
        p.n_ubatch    = cparams.n_ubatch;
        p.n_sinks     = (uint32_t) spec.sinks;

        if (rule->needs().k_unrotated) {
            rope_rule = std::make_unique<llama_kv_rope>(hadamard_of(kv));
            p.rope    = rope_rule.get();
        }

        il_last = 0;
        for (const auto & [il, i] : kv.map_layer_ids) {
            il_last = std::max(il_last, il);
        }

        scores = std::make_unique<llama_kv_scores>(*rule, p, layers, kv.n_stream, hadamard_of(kv, true));
    }

    if (spec.positions != LLAMA_KV_POSITIONS_TRUE) {
        llama_kv_frame::rule rule;
        rule.ranks        = spec.positions == LLAMA_KV_POSITIONS_CACHE;
        rule.is_auto      = spec.positions == LLAMA_KV_POSITIONS_AUTO;
        rule.n_ctx_train  = kv.hparams.n_ctx_train;
        rule.n_sinks      = (uint32_t) spec.sinks;
        rule.rotate_every = rotate_every();

        if (const char * text = getenv("LLAMA_KV_REBASE_AT")) { // tests: sooner than after 65536 tokens
            rule.rebase_at = std::max(1, atoi(text));
        }

        frames.assign(kv.n_stream, llama_kv_frame(kv.get_size(), rule));

        rope = std::make_unique<llama_kv_rope>(hadamard_of(kv));
        if (kv_swa) {
            layers_swa = layers_of(*kv_swa);
            rope_swa   = std::make_unique<llama_kv_rope>(hadamard_of(*kv_swa));
        }
    }
}

static bool has_layer(const std::vector<llama_kv_layer> & layers, int32_t il) {
    return std::any_of(layers.begin(), layers.end(), [&](const auto & layer) { return (int32_t) layer.il == il; });
}

void llama_kv_policy::observe_k(const ggml_tensor * k_cur, int32_t il) {
    if (rope_rule && has_layer(layers, il) && (!rope_rule->observe((uint32_t) il, k_cur) || !rope_rule->is_linear((uint32_t) il))) {
        llama_kv_policy_refuse("this model has keys that are changed after their rotation, and the policy " + std::string(spec.desc->name) +
                " reads keys without it: use another policy");
    }
    if (!rope) {
        return;
    }

    auto & to = has_layer(layers_swa, il) ? rope_swa : rope;

    if (!to->observe((uint32_t) il, k_cur)) {
        llama_kv_policy_refuse("this model has keys that are changed after their rotation, so positions=" + std::string(positions_name()) +
                " is not possible: use positions=true");
    }
}

bool llama_kv_policy::prepare_rotations() {
    if (is_prepared) {
        return true;
    }

    try {
        if (rope_rule) {
            rope_rule->prepare_undo();
        }
        n_rope_layers = 0;
        for (const auto & layer : layers) {
            n_rope_layers += rope && rope->has(layer.il);
        }
        if (spec.update == LLAMA_KV_UPDATE_GATHER) {
            gather = std::make_unique<llama_kv_gather>(rope.get(), *backends, layers, kv.n_stream, lctx->get_cparams().n_ubatch, kv.v_trans);
        } else if (rope) {
            uint32_t n_protect = 0;
            for (const auto & ledger : ledgers) {
                n_protect = std::max(n_protect, ledger.n_protect());
            }
            sinks = std::make_unique<llama_kv_sinks>(*rope, *backends_pins, layers, kv.n_stream);
            sinks->resize(n_protect);
        }
    } catch (const std::exception & err) {
        sinks.reset();
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return false;
    }

    is_prepared = true;

    return true;
}

const llama_kv_ledger & llama_kv_policy::ledger(llama_seq_id seq_id) const {
    return ledgers[kv.seq_to_stream[seq_id]];
}

size_t llama_kv_policy::get_key(llama_seq_id seq_id, int32_t il, llama_pos pos, void * data, size_t size) const {
    const uint32_t strm = kv.seq_to_stream[seq_id];

    for (const uint32_t slot : ledgers[strm].kept()) {
        if (ledgers[strm].pos_of(slot) != pos) {
            continue;
        }
        for (const auto & layer : layers) {
            if ((int32_t) layer.il == il) {
                const ggml_tensor * k = layer.k_stream[strm];

                if (data && size >= k->nb[1]) {
                    ggml_backend_sched_synchronize(lctx->get_sched());
                    ggml_backend_tensor_get(k, data, slot*k->nb[1], k->nb[1]);
                }
                return k->nb[1];
            }
        }
    }

    return 0;
}

int32_t llama_kv_policy::get_delta(llama_seq_id seq_id) const {
    const uint32_t strm = kv.seq_to_stream[seq_id];

    return frames.empty() || ledgers[strm].empty() ? 0 : frames[strm].delta(ledgers[strm]);
}

uint32_t llama_kv_policy::rotate_every() const {
    return spec.rotate_every > 0 ? (uint32_t) spec.rotate_every : spec.default_rotate_every(has_quantized_keys());
}

const char * llama_kv_policy::positions_name() const {
    return spec.positions_name();
}

bool llama_kv_policy::is_ranks(llama_seq_id seq_id) const {
    return !frames.empty() && frames[kv.seq_to_stream[seq_id]].is_ranks();
}

int64_t llama_kv_policy::n_rotations(llama_seq_id seq_id) const {
    return frames.empty() ? 0 : frames[kv.seq_to_stream[seq_id]].n_batches();
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

// nothing has changed yet: can these tokens come?
bool llama_kv_policy::accepts(uint32_t strm, const llama_pos * pos, uint32_t n) {
    const auto & ledger = ledgers[strm];

    const auto refuse = [&](const std::string & sentence) {
        LLAMA_LOG_ERROR("llama_kv_policy: sequence %u, position %d: %s\n", strm, pos[0], sentence.c_str());
        return false;
    };

    if (conditions[strm].lost) {
        return refuse("a failed step has left the cache of this sequence incomplete: clear it and read the text again");
    }
    if (conditions[strm].poisoned && pos[0] > 0) {
        return refuse("this sequence is empty, since its state could not be taken over: clear it and read the text from position 0");
    }

    const int64_t n_learned = llama_kv_policy_n_learned(kv.model);
    if (n_learned > 0 && pos[0] + (int64_t) n > n_learned) {
        return refuse("this model has learned positions for " + std::to_string(n_learned) + " tokens, and a bounded cache does not change that: clear it and begin anew");
    }

    for (uint32_t i = 1; i < n; ++i) {
        if (pos[i] != pos[0] + (llama_pos) i) {
            return refuse("position " + std::to_string(pos[i]) + " follows " + std::to_string(pos[i - 1]) + ": a bounded cache takes text, one position per token");
        }
    }
    if (pos[0] < 0 || pos[0] + (int64_t) n > llama_kv_ledger::pos_end) {
        return refuse("a sequence ends at position " + std::to_string(llama_kv_ledger::pos_end) + ": clear it and begin anew");
    }
    if (!ledger.empty() && pos[0] != ledger.pos_last() + 1) {
        return refuse("the newest token of the sequence stands at position " + std::to_string(ledger.pos_last()));
    }

    return true;
}

bool llama_kv_policy::apply(slot_info & sinfo, const llama_ubatch & ubatch) {
    const int64_t t_start = ggml_time_us();

    const uint32_t n = (uint32_t) sinfo.size(); // tokens per stream

    // a ubatch that was neither computed nor removed
    for (const uint32_t strm : inflight) {
        conditions[strm].lost = true;
    }
    inflight.clear();

    for (uint32_t s = 0; s < sinfo.n_stream(); ++s) {
        if (!accepts((uint32_t) sinfo.strm[s], ubatch.pos + s*n, n)) {
            return false;
        }
    }

    try {
        if (!prepare_rotations()) {
            return false;
        }
        for (uint32_t s = 0; s < sinfo.n_stream(); ++s) {
            settle(sinfo.strm[s]);
        }
        place(sinfo, ubatch);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        for (const uint32_t strm : inflight) {
            conditions[strm].lost = true;
        }
        return false;
    }

    kv.apply_ubatch(sinfo, ubatch);

    n_steps++;
    t_host_us += ggml_time_us() - t_start;

    return true;
}

void llama_kv_policy::place(slot_info & sinfo, const llama_ubatch & ubatch) {
    const uint32_t n = (uint32_t) sinfo.size();

    captures.clear();
    rewrites.clear();
    step.clear();

    n_seen = 0;

    if (ubatch.data) {
        ubatch.data->pos_model.clear();
        ubatch.data->pos_rank .clear();
    }

    for (uint32_t s = 0; s < sinfo.n_stream(); ++s) {
        place((uint32_t) sinfo.strm[s], ubatch.pos[s*n], sinfo.idxs[s], s*n, ubatch);
    }

    if (scores) {
        if (!scores->is_on_cpu()) {
            ggml_backend_sched_synchronize(lctx->get_sched());
        }
        scores->set_step(step);
    }

    if (gather && rope) {
        std::vector<int32_t>  pos(ubatch.n_tokens);
        std::vector<uint32_t> strm;
        std::vector<uint32_t> slots;

        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            pos[i] = ubatch.pos_model()[i];
            strm .push_back((uint32_t) sinfo.strm[i/n]);
            slots.push_back(sinfo.idxs[i/n][i%n]);
        }

        ggml_backend_sched_synchronize(lctx->get_sched());
        gather->set(pos, strm, slots);
    }
}

bool llama_kv_policy::can_reuse() const {
    return captures.empty() && !built.captures && std::equal(rewrites.begin(), rewrites.end(), built.rewrites.begin(), built.rewrites.end(),
            [](const tokens & a, const tokens & b) { return a.strm == b.strm && a.n == b.n; });
}

void llama_kv_policy::place(uint32_t strm, llama_pos pos0, std::vector<uint32_t> & slots, uint32_t i_tok, const llama_ubatch & ubatch) {
    const uint32_t n = (uint32_t) slots.size();

    auto & ledger = ledgers[strm];

    // until the end: what goes wrong on the way leaves the books ahead of the data
    conditions[strm] = { /*.poisoned =*/ false, /*.lost =*/ true };

    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    std::vector<uint32_t> given; // [n_lane] victims of this token

    if (scores && n == 1 && ledger.n_used() == ledger.budget() && pos0 == ledger.pos_last() + 1) {
        given = take_victims(strm, pos0);
    }

    if (!ledger.place(pos0, n, slots, victims, moves)) {
        throw std::runtime_error("no room for " + std::to_string(n) + " tokens");
    }
    inflight.push_back(strm);

    // upstream's apply_ubatch purges what lies before an overwritten cell; an empty cell has nothing to purge
    for (const uint32_t slot : victims) {
        kv.v_cells[strm].rm(slot);
    }

    lane_moves.clear();
    if (scores) {
        place_lanes(strm, pos0, slots, given);
    }

    bool ok = true;

    if (gather && !moves.empty()) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        ok = copy_rows(strm, moves, ledger.n_used() - n);

        move_cells(strm, moves);
    }

    if (!frames.empty()) {
        const bool per_head = is_per_head();

        const auto plan = frames[strm].place(ledger, pos0, slots, gather || per_head, per_head);

        if (plan.switched) {
            LLAMA_LOG_WARN("%s: position %d is past the trained context of %u tokens: from here on a token's position is its rank in the cache\n",
                    __func__, pos0, kv.hparams.n_ctx_train);
        }

        if (scores && plan.rebased) {
            scores->forget_queries(strm, INT32_MIN); // they stand in the old frame
        }

        ok = ok && rotate(strm, plan, pos0);

        if (gather && frames[strm].is_ranks() && (unrotated[strm] || plan.rebased || plan.switched)) {
            ok = ok && gather->rotate(strm, frames[strm].first(ledger), ledger.n_used() - n);
            unrotated[strm] = false;

            for (uint32_t i = 0; scores && scores->has_stands() && i < ledger.n_used() - n; ++i) {
                scores->set_stand(strm, i, frames[strm].first(ledger) + (int32_t) i);
            }
        }

        if (is_per_head() && !gather) {
            scores->lanes(strm).set_recording(frames[strm].is_ranks());
        }

        set_positions(strm, i_tok, n, ubatch);

        const int32_t rank = pos0 - ledger.pos_first();
        if (sinks && rank < (int32_t) ledger.n_protect()) {
            captures.push_back({ strm, i_tok, (uint32_t) rank, std::min<uint32_t>(n, ledger.n_protect() - rank) });
        }
    } else if (!warned_far && (uint32_t) (pos0 - ledger.pos_first()) >= kv.hparams.n_ctx_train) {
        warned_far = true;
        LLAMA_LOG_WARN("%s: position %d is past the trained context of %u tokens; with positions=true the kept tokens are now further away than the model has seen\n",
                __func__, pos0, kv.hparams.n_ctx_train);
    }

    if (!ok) {
        throw std::runtime_error("failed to copy or to rotate the kept tokens");
    }

    if (scores && scores->has_stands()) {
        scores->set_stands(step.back(), frames.empty() ? 0 : frames[strm].base());
    }

    conditions[strm].lost = false;
}

bool llama_kv_policy::rotate(uint32_t strm, const llama_kv_frame::plan & plan, llama_pos pos0) {
    const bool turns_lanes = is_per_head() && plan.turning && !gather;

    if (plan.rebased == 0 && plan.n_sinks == 0 && !plan.pinned && plan.turns.empty() && !turns_lanes) {
        return true;
    }

    const auto & ledger = ledgers[strm];

    ggml_backend_sched_synchronize(lctx->get_sched());

    if (plan.rebased && kv_swa) {
        std::vector<llama_kv_frame::turn> turns;
        for (uint32_t i = 0; i < kv_swa->get_size(); ++i) {
            if (!kv_swa->v_cells[strm].is_empty(i)) {
                turns.push_back({ i, -plan.rebased });
            }
        }
        if (!llama_kv_rotate(*rope_swa, *backends_turns, layers_swa, strm, turns)) {
            return false;
        }
    }

    if (turns_lanes ? !rotate_lanes(strm, plan, pos0) : !llama_kv_rotate(*rope, *backends_turns, layers, strm, plan.turns)) {
        return false;
    }

    const bool has_stands = scores && scores->has_stands();

    if (has_stands && !turns_lanes) {
        scores->turn_stands(strm, 0, plan.turns);
    }

    if (!sinks) {
        return true;
    }

    std::vector<uint32_t> slots;
    for (uint32_t i = 0; i < ledger.n_protect() && ledger.slot_of_first(i) >= 0; ++i) {
        slots.push_back((uint32_t) ledger.slot_of_first(i));
    }

    // the originals, and so what is rewritten from them, stand one position apart
    for (uint32_t i = 0; has_stands && i < slots.size(); ++i) {
        if (i < plan.n_sinks || (plan.pinned && i >= (uint32_t) spec.sinks)) {
            scores->set_stand(strm, slots[i], frames[strm].first(ledger) + (int32_t) i);
        }
    }

    if (plan.n_sinks > 0) {
        if (!sinks->rewrite(strm, plan.delta, slots.data(), plan.n_sinks)) {
            return false;
        }
        if (sinks->any_in_graph()) {
            rewrites.push_back({ strm, 0, 0, plan.n_sinks });
        }
    }

    const uint32_t n_sinks = (uint32_t) spec.sinks;

    return !plan.pinned || sinks->rewrite_many(strm, plan.delta, n_sinks, slots.data() + n_sinks, (uint32_t) slots.size() - n_sinks);
}

void llama_kv_policy::set_positions(uint32_t strm, uint32_t i_tok, uint32_t n, const llama_ubatch & ubatch) const {
    const auto & frame  = frames [strm];
    const auto & ledger = ledgers[strm];

    if (!frame.is_ranks() || !ubatch.data || ledger.gap() == 0) {
        return;
    }

    auto & data = *ubatch.data;

    if (data.pos_rank.empty()) {
        data.pos_model.assign(ubatch.pos, ubatch.pos + ubatch.n_tokens);
        data.pos_rank .assign(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    }
    for (uint32_t i = i_tok; i < i_tok + n; ++i) {
        data.pos_model[i] -= frame.base();
        data.pos_rank [i] -= ledger.gap();
    }
}

void llama_kv_policy::commit() {
    // an attention of another kind, which stores keys that nobody has seen: better no answer than a wrong one
    bool ok = (n_seen == 0 && captures.empty()) || n_seen == n_rope_layers;
    if (!ok) {
        LLAMA_LOG_ERROR("%s: the keys of %zu of %zu layers were seen: this model cannot have positions=%s, use positions=true\n", __func__,
                n_seen, n_rope_layers, positions_name());
    }

    if (scores && !scores->commit()) {
        LLAMA_LOG_ERROR("%s: no memory to choose the tokens that go\n", __func__);
        ok = false;
    }

    for (const uint32_t strm : inflight) {
        conditions[strm].lost = !ok;
    }

    // the evictions that a chunk owes wait for the next ubatch: until then its tokens can still be taken back
    inflight.clear();
}

void llama_kv_policy::settle(llama_seq_id seq_id) {
    const uint32_t strm = kv.seq_to_stream[seq_id];

    auto & ledger = ledgers[strm];

    if (ledger.pos_placed() == llama_kv_ledger::none || conditions[strm].lost || std::find(inflight.begin(), inflight.end(), strm) != inflight.end()) {
        return;
    }

    // what goes wrong on the way leaves the books ahead of the data
    conditions[strm].lost = true;

    const uint32_t n_over = ledger.n_used() - std::min(ledger.n_used(), ledger.budget());

    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    lane_moves.clear();
    if (scores && n_over > 0) {
        ggml_backend_sched_synchronize(lctx->get_sched());

        if (!scores->choose(strm, n_over, candidates(strm, ledger.pos_last()), true)) {
            throw std::runtime_error("there are fewer tokens that may go than have to");
        }

        const auto & choice = scores->get_choice(strm);

        ledger.set_victims({ choice.slots.begin(), choice.slots.begin() + n_over });
    }

    ledger.commit(victims, moves);

    for (const uint32_t slot : victims) {
        kv.v_cells[strm].rm(slot);
    }

    bool any = !moves.empty();
    if (scores && n_over > 0) {
        any = scores->lanes(strm).evict(scores->get_choice(strm).slots, n_over, ledger.budget(), lane_moves);
        scores->forget_choice(strm);
    }

    if (any) {
        ggml_backend_sched_synchronize(lctx->get_sched());

        if (!copy_rows(strm, moves, ledger.n_used())) {
            throw std::runtime_error("failed to move the kept rows");
        }
        move_cells(strm, moves);
    }

    conditions[strm].lost = false;
}

void llama_kv_policy::move_cells(uint32_t strm, const std::vector<llama_kv_ledger::move> & moves) {
    auto & cells = kv.v_cells[strm];

    for (const auto & m : moves) {
        const llama_pos         pos = cells.pos_get(m.src);
        const llama_kv_cell_ext ext = cells.ext_get(m.src);

        cells.rm(m.src);
        cells.pos_set(m.dst, pos);
        cells.ext_set(m.dst, ext);
        cells.seq_add(m.dst, (llama_seq_id) strm);

        if (!frames.empty()) {
            frames[strm].move(m.src, m.dst);
        }
    }
}

size_t llama_kv_policy::index_of(int32_t il) const {
    const auto it = kv.map_layer_ids.find(il);

    return it == kv.map_layer_ids.end() ? SIZE_MAX : (size_t) it->second;
}

void llama_kv_policy::capture(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, int32_t il, const slot_info & sinfo,
        bool is_reserve) {
    if (is_reserve) {
        observe_k(k_cur, il);
    }

    const bool is_mine = has_layer(layers, il);

    if (scores && is_mine) {
        scores->build_norms(ctx, gf, k_cur, v_cur, index_of(il), sinfo.s0, sinfo.s1 - sinfo.s0 + 1);
    }

    if (!is_mine || is_reserve) {
        return;
    }

    if (n_seen == 0) {
        built.captures = !captures.empty();
        built.rewrites = rewrites;
    }
    n_seen += rope && rope->has(il);

    for (const auto & c : captures) {
        ggml_tensor * keys = ggml_view_2d(ctx, k_cur, k_cur->ne[0]*k_cur->ne[1], c.n, k_cur->nb[2], c.i_tok*k_cur->nb[2]);

        sinks->capture(ctx, gf, keys, il, c.strm, c.rank);
    }

    for (const auto & r : rewrites) {
        if (sinks->in_graph(il)) {
            sinks->build(ctx, gf, il, r.strm, r.n);
        }
    }

    if (gather) {
        gather->build(ctx, gf, k_cur, il);
    }
}

void llama_kv_policy::clear() {
    if (scores) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        scores->clear();
    }
    for (auto & ledger : ledgers) {
        ledger.reset();
    }
    for (auto & frame : frames) {
        frame.reset();
    }

    inflight.clear();
    conditions.assign(kv.n_stream, {});
}
