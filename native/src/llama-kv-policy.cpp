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
    unrotated(kv.n_stream, false) {
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
        rule = spec.desc->rule();

        const std::string scope = spec.get_scope();

        llama_kv_scores::params p;
        p.scope       = scope == "token" ? LLAMA_KV_SCOPE_TOKEN : scope == "layer" ? LLAMA_KV_SCOPE_LAYER : LLAMA_KV_SCOPE_HEAD;
        p.n_queries   = score_queries() > 0 ? (uint32_t) score_queries() : UINT32_MAX;
        p.evict_every = evict_every();
        p.eager       = spec.desc->eager;
        p.pages       = spec.desc->pages;
        p.compact     = spec.update == LLAMA_KV_UPDATE_GATHER;
        p.v_trans     = kv.v_trans;
        p.n_ubatch    = cparams.n_ubatch;

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
    if (!rope) {
        return;
    }

    auto & to = has_layer(layers_swa, il) ? rope_swa : rope;

    if (!to->observe((uint32_t) il, k_cur)) {
        llama_kv_policy_refuse("this model has keys that are changed after their rotation, so positions=" + std::string(positions_name()) +
                " is not possible: use positions=true.");
    }
}

bool llama_kv_policy::prepare_rotations() {
    if (is_prepared) {
        return true;
    }

    try {
        if (rope) {
            for (const auto & layer : layers) {
                n_rope_layers += rope->has(layer.il);
            }
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
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return false;
    }

    is_prepared = true;

    return true;
}

const llama_kv_ledger & llama_kv_policy::ledger(llama_seq_id seq_id) const {
    return ledgers[kv.seq_to_stream[seq_id]];
}

int32_t llama_kv_policy::get_head(llama_seq_id seq_id, int32_t il, int32_t i_head, llama_pos * pos, float * weight, int32_t n_max) {
    const uint32_t strm = kv.seq_to_stream[seq_id];
    const size_t   i    = index_of(il);

    if (i == SIZE_MAX || i_head < 0 || i_head >= (int32_t) layers[i].n_head_kv) {
        return -1;
    }

    std::vector<std::pair<llama_pos, uint32_t>> kept;

    const float * weights = nullptr;

    if (scores) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        weights = scores->get_weights(strm, i, (uint32_t) i_head);

        const int32_t * p = scores->lanes(strm).pos(scores->lane_of(i, (uint32_t) i_head));
        for (uint32_t slot = 0; slot < ledgers[strm].n_slots(); ++slot) {
            if (p[slot] != llama_kv_lanes::none) {
                kept.push_back({ p[slot], slot });
            }
        }
        std::sort(kept.begin(), kept.end());
    } else {
        for (const uint32_t slot : ledgers[strm].kept()) {
            kept.push_back({ ledgers[strm].pos_of(slot), slot });
        }
    }

    for (size_t j = 0; j < kept.size() && (int32_t) j < n_max; ++j) {
        if (pos) {
            pos[j] = kept[j].first;
        }
        if (weight) {
            weight[j] = weights ? weights[kept[j].second] : 0.0f;
        }
    }

    return (int32_t) kept.size();
}

int32_t llama_kv_policy::get_shares(llama_seq_id seq_id, llama_pos * pos, float * share, int32_t n_max) const {
    const auto & lanes = scores->lanes(kv.seq_to_stream[seq_id]);

    std::map<llama_pos, uint32_t> count;
    for (uint32_t lane = 0; lane < lanes.n_lane(); ++lane) {
        for (uint32_t slot = 0; slot < lanes.n_slots(); ++slot) {
            if (lanes.pos(lane)[slot] != llama_kv_lanes::none) {
                count[lanes.pos(lane)[slot]]++;
            }
        }
    }

    int32_t n = 0;
    for (const auto & [p, c] : count) {
        if (n < n_max) {
            if (pos) {
                pos[n] = p;
            }
            if (share) {
                share[n] = (float) c/lanes.n_lane();
            }
        }
        n++;
    }

    return n;
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

bool llama_kv_policy::on_cpu() const {
    return std::all_of(layers.begin(), layers.end(), [](const auto & layer) {
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(layer.k->buffer));

        return !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
    });
}

uint32_t llama_kv_policy::evict_every() const {
    const uint32_t n = spec.page_size > 0 ? (uint32_t) spec.page_size : spec.evict_every > 0 ? (uint32_t) spec.evict_every : spec.desc->evict_every;

    // as many as can be candidates at once
    const auto & l = ledgers[0];

    return std::max<uint32_t>(1, std::min(n, l.budget() - l.n_protect() - l.n_recent()));
}

int64_t llama_kv_policy::score_queries() const {
    return spec.score_queries >= 0 ? spec.score_queries : on_cpu() ? 0 : llama_kv_policy_spec::SCORE_QUERIES_DEVICE;
}

uint32_t llama_kv_policy::rotate_every() const {
    return spec.rotate_every > 0 ? (uint32_t) spec.rotate_every : spec.default_rotate_every(!layers.empty() && ggml_is_quantized(layers[0].k->type));
}

const char * llama_kv_policy::positions_name() const {
    return spec.positions == LLAMA_KV_POSITIONS_TRUE ? "true" : spec.positions == LLAMA_KV_POSITIONS_AUTO ? "auto" : "cache";
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

bool llama_kv_policy::apply(slot_info & sinfo, const llama_ubatch & ubatch) {
    const int64_t t_start = ggml_time_us();

    if (broken) {
        LLAMA_LOG_ERROR("%s: the cache is inconsistent after a failed copy or rotation: clear it first\n", __func__);
        return false;
    }

    if (!prepare_rotations()) {
        return false;
    }

    const uint32_t n = (uint32_t) sinfo.size(); // tokens per stream

    const bool captured = !captures.empty();

    std::vector<tokens> rewritten; // by the graph before this one
    rewritten.swap(rewrites);

    captures.clear();
    inflight.clear();
    step.clear();

    n_seen = 0;

    if (ubatch.data) {
        ubatch.data->pos_model.clear();
        ubatch.data->pos_rank .clear();
    }

    for (uint32_t s = 0; s < sinfo.n_stream(); ++s) {
        if (!apply((uint32_t) sinfo.strm[s], ubatch.pos[s*n], sinfo.idxs[s], s*n, ubatch)) {
            return false;
        }
    }

    if (scores) {
        if (!on_cpu()) {
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

    const bool same_sinks = std::equal(rewrites.begin(), rewrites.end(), rewritten.begin(), rewritten.end(),
            [](const tokens & a, const tokens & b) { return a.strm == b.strm && a.n == b.n; });

    no_reuse = captured || !captures.empty() || !same_sinks;

    kv.apply_ubatch(sinfo, ubatch);

    n_steps++;
    t_host_us += ggml_time_us() - t_start;

    return true;
}

bool llama_kv_policy::apply(uint32_t strm, llama_pos pos0, std::vector<uint32_t> & slots, uint32_t i_tok, const llama_ubatch & ubatch) {
    const llama_seq_id seq_id = ubatch.seq_id[i_tok][0];
    const uint32_t     n      = (uint32_t) slots.size();

    auto & ledger = ledgers[strm];

    const int64_t n_learned = llama_kv_policy_n_learned(kv.model);
    if (n_learned > 0 && pos0 + (int64_t) n > n_learned) {
        LLAMA_LOG_ERROR("%s: this model has learned positions for %d tokens, and a bounded cache does not change that: clear it and begin anew\n", __func__,
                (int) n_learned);
        return false;
    }

    for (uint32_t i = 1; i < n; ++i) {
        if (ubatch.pos[i_tok + i] != pos0 + (llama_pos) i) {
            LLAMA_LOG_ERROR("%s: position %d follows %d: a bounded cache takes text, one position per token\n", __func__,
                    ubatch.pos[i_tok + i], ubatch.pos[i_tok + i - 1]);
            return false;
        }
    }

    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    std::vector<uint32_t> given; // [n_lane] victims of this token

    if (scores && n == 1 && ledger.n_used() == ledger.budget() && pos0 == ledger.pos_last() + 1) {
        given = take_victims(strm, pos0, seq_id);
    }

    if (!ledger.place(pos0, n, slots, victims, moves)) {
        LLAMA_LOG_ERROR("%s: %u tokens at position %d do not follow position %d, or do not fit: %u of %u slots are used\n", __func__,
                n, pos0, ledger.pos_last(), ledger.n_used(), ledger.n_slots());
        return false;
    }

    // upstream's apply_ubatch purges what lies before an overwritten cell; an empty cell has nothing to purge
    for (const uint32_t slot : victims) {
        kv.v_cells[strm].rm(slot);
    }

    lane_moves.clear();
    if (scores) {
        place_lanes(strm, pos0, slots, given);
    }

    inflight.push_back(seq_id);

    if (gather && !moves.empty()) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        broken = !copy_rows(strm, moves, ledger.n_used() - n);

        for (const auto & m : moves) {
            move_cell(strm, m.src, m.dst, seq_id);
        }
    }

    if (!frames.empty()) {
        const bool per_head = is_per_head();

        const auto plan = frames[strm].place(ledger, pos0, slots, gather || per_head, per_head);

        if (plan.switched) {
            LLAMA_LOG_WARN("%s: position %d is past the trained context of %u tokens: from here on a token's position is its rank in the cache\n",
                    __func__, pos0, kv.hparams.n_ctx_train);
        }

        broken = broken || !rotate(strm, plan, pos0);

        if (gather && frames[strm].is_ranks() && (unrotated[strm] || plan.rebased || plan.switched)) {
            broken = broken || !gather->rotate(strm, frames[strm].first(ledger), ledger.n_used() - n);
            unrotated[strm] = false;
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

    if (broken) {
        LLAMA_LOG_ERROR("%s: failed to copy or to rotate the kept tokens\n", __func__);
    }

    return !broken;
}

std::vector<uint32_t> llama_kv_policy::take_victims(uint32_t strm, llama_pos pos0, llama_seq_id seq_id) {
    auto & ledger = ledgers[strm];
    auto & lanes  = scores->lanes(strm);
    auto & choice = scores->get_choice(strm);

    const uint32_t n_lane = lanes.n_lane();

    if (choice.n_left() == 0) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        scores->choose(strm, scores->get_params().evict_every, candidates(strm, pos0), false);
    }

    if (!scores->get_params().eager) {
        std::vector<uint32_t> res(n_lane);
        for (uint32_t lane = 0; lane < n_lane; ++lane) {
            res[lane] = choice.slots[(size_t) lane*choice.n + choice.i];
        }
        choice.i++;

        ledger.set_victims({ res[0] });

        return res;
    }

    // all go at once, and the tokens to come find free slots, the same in every lane
    ggml_backend_sched_synchronize(lctx->get_sched());

    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    ledger.set_victims({ choice.slots.begin(), choice.slots.begin() + choice.n });
    ledger.shrink(ledger.budget() - choice.n, victims, moves);

    for (const uint32_t slot : victims) {
        kv.v_cells[strm].rm(slot);
    }

    if (lanes.evict(choice.slots, choice.n, ledger.n_used(), lane_moves)) {
        broken = !copy_rows(strm, moves, ledger.n_used());
    }
    for (const auto & m : moves) {
        move_cell(strm, m.src, m.dst, seq_id);
        if (!frames.empty()) {
            frames[strm].move(m.src, m.dst);
        }
    }

    scores->forget_choice(strm);

    return {};
}

llama_kv_scores::range llama_kv_policy::candidates(uint32_t strm, llama_pos pos_last) const {
    const auto & ledger = ledgers[strm];

    return { ledger.pos_first() + (llama_pos) ledger.n_protect(), pos_last - (llama_pos) ledger.n_recent() };
}

void llama_kv_policy::place_lanes(uint32_t strm, llama_pos pos0, const std::vector<uint32_t> & slots, const std::vector<uint32_t> & given) {
    auto & ledger = ledgers[strm];
    auto & lanes  = scores->lanes(strm);

    const auto & choice = scores->get_choice(strm);

    llama_kv_scores::stream_step st;
    st.strm = strm;

    if (!given.empty()) {
        lanes.replace(pos0, given, st.lane_slots, lane_moves);
        if (gather) {
            scores->close_gaps(strm, given);
        }
    } else {
        lanes.put(pos0, slots);
        st.slots = slots;
        if (slots.size() > 1) {
            scores->forget_choice(strm);
        }
    }

    const bool full = ledger.n_used() == ledger.budget();

    if (slots.size() == 1) {
        // tokens to come before a choice, this one not counted
        const uint32_t window = rule->needs().window;
        const uint32_t left   = full ? choice.n_left() : ledger.budget() - ledger.n_used();
        const uint32_t every  = full && !scores->get_params().eager ? std::min(window, scores->get_params().evict_every) : window;

        st.clear = window > 0 && left + 1 == every;
        st.want  = full && choice.n_left() == 0;
        st.next  = candidates(strm, pos0 + 1);
    } else {
        const uint32_t window = rule->needs().window;

        st.clear = window > 0 && slots.size() >= window;
    }

    step.push_back(std::move(st));
}

bool llama_kv_policy::copy_rows(uint32_t strm, const std::vector<llama_kv_ledger::move> & moves, uint32_t n_kept) {
    const bool per_head = is_per_head();

    const auto moves_of = [&](size_t i_layer, uint32_t i_head) -> const std::vector<llama_kv_ledger::move> & {
        return per_head ? lane_moves[scores->lane_of(i_layer, i_head)] : moves;
    };

    if (scores) {
        scores->move(strm, lane_moves);
    }

    unrotated[strm] = true;

    if (gather) {
        // a rule may read the stored keys before they are rotated again
        const bool with_keys = !frames.empty() && (!frames[strm].is_ranks() || (rule && rule->needs().k_rows));

        return gather->move(strm, moves_of, per_head, n_kept, with_keys);
    }
    if (per_head) {
        llama_kv_move_heads(layers, strm, moves_of, kv.v_trans);
        return true;
    }

    return llama_kv_move(*backends, layers, strm, moves, kv.v_trans);
}

// every head by the ranks in its own kept set
bool llama_kv_policy::rotate_lanes(uint32_t strm, const llama_kv_frame::plan & plan, llama_pos pos0) {
    const auto & ledger = ledgers[strm];

    auto & lanes = scores->lanes(strm);

    const llama_pos pos_min = ledger.pos_first() + (llama_pos) ledger.n_protect();

    std::vector<std::vector<llama_kv_turn>> turns(layers.size());
    std::vector<llama_kv_turn>              cur;

    for (size_t i = 0; i < layers.size(); ++i) {
        for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
            if (h == 0 || scores->get_params().scope == LLAMA_KV_SCOPE_HEAD) {
                const uint32_t lane = scores->lane_of(i, h);

                cur = plan.switched ? lanes.turns_from_true(lane, pos_min, ledger.pos_last()) : lanes.turns(lane, pos_min, pos0, plan.rebased);
            }
            for (const auto & t : cur) {
                turns[i].push_back({ t.slot*layers[i].n_head_kv + h, t.delta });
            }
        }

        // equal deltas side by side, as in llama_kv_frame
        std::sort(turns[i].begin(), turns[i].end(), [](const auto & a, const auto & b) {
            return a.delta != b.delta ? a.delta < b.delta : a.slot < b.slot;
        });
    }

    return llama_kv_rotate_heads(*rope, *backends_turns, layers, strm, turns);
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

    if (!sinks) {
        return true;
    }

    std::vector<uint32_t> slots;
    for (uint32_t i = 0; i < ledger.n_protect() && ledger.slot_of_first(i) >= 0; ++i) {
        slots.push_back((uint32_t) ledger.slot_of_first(i));
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
    const int64_t t_start = ggml_time_us();

    // an attention of another kind, which stores keys that nobody has seen: better no answer than a wrong one
    if ((n_seen > 0 || !captures.empty()) && n_seen != n_rope_layers) {
        LLAMA_LOG_ERROR("%s: the keys of %zu of %zu layers were seen: this model cannot have positions=%s, use positions=true\n", __func__,
                n_seen, n_rope_layers, positions_name());
        broken = true;
    }

    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    if (scores) {
        scores->commit();
    }

    for (const llama_seq_id seq_id : inflight) {
        const uint32_t strm = kv.seq_to_stream[seq_id];

        auto & ledger = ledgers[strm];

        const uint32_t n_over = ledger.n_used() - std::min(ledger.n_used(), ledger.budget());

        lane_moves.clear();
        if (scores && n_over > 0) {
            ggml_backend_sched_synchronize(lctx->get_sched());
            scores->choose(strm, n_over, candidates(strm, ledger.pos_last()), true);

            const auto & choice = scores->get_choice(strm);
            GGML_ASSERT(choice.n == n_over);

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
        if (!any) {
            continue;
        }

        ggml_backend_sched_synchronize(lctx->get_sched());

        if (!copy_rows(strm, moves, ledger.n_used())) {
            LLAMA_LOG_ERROR("%s: failed to move the kept rows\n", __func__);
            broken = true;
        }

        for (const auto & m : moves) {
            move_cell(strm, m.src, m.dst, seq_id);
            if (!frames.empty()) {
                frames[strm].move(m.src, m.dst);
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

ggml_tensor * llama_kv_policy::cpy_k(ggml_context * ctx, ggml_tensor * k_cur, int32_t il, const slot_info & sinfo) const {
    return is_single(k_cur, il, sinfo) ? scores->build_k(ctx, k_cur, index_of(il), sinfo.s0) : nullptr;
}

ggml_tensor * llama_kv_policy::cpy_v(ggml_context * ctx, ggml_tensor * v_cur, int32_t il, const slot_info & sinfo) const {
    return is_single(v_cur, il, sinfo) ? scores->build_v(ctx, v_cur, index_of(il), sinfo.s0) : nullptr;
}

bool llama_kv_policy::is_single(const ggml_tensor * cur, int32_t il, const slot_info & sinfo) const {
    return is_per_head() && has_layer(layers, il) && cur->ne[2] == sinfo.s1 - sinfo.s0 + 1;
}

void llama_kv_policy::score(ggml_context * ctx, ggml_cgraph * gf, int32_t il, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq, ggml_tensor * mask,
        ggml_tensor * sinks, float scale) const {
    const size_t i = index_of(il);

    if (!scores || i == SIZE_MAX || k->view_src != layers[i].k) {
        return;
    }

    if (k->ne[2] != layers[i].n_head_kv || (q->ne[2] % k->ne[2]) != 0) {
        llama_kv_policy_refuse("this model's attention has other KV heads than its cache, so the policy " + std::string(spec.desc->name) +
                " cannot tell their weights apart: use streaming or random.");
    }

    llama_kv_scores::attention a;
    a.q        = q;
    a.k        = k;
    a.kq       = kq;
    a.mask     = mask;
    a.sinks    = sinks;
    a.scale    = scale;
    a.soft_cap = kv.hparams.attn_soft_cap ? kv.hparams.f_attn_logit_softcapping : 0.0f;
    a.max_bias = kv.hparams.f_max_alibi_bias;
    a.is_first = (int32_t) layers[i].il == il;
    a.is_last  = il == il_last;

    scores->build(ctx, gf, a, i, (uint32_t) (k->view_offs/layers[i].k->nb[2]));
}

uint32_t llama_kv_policy::n_nodes(uint32_t n_tokens) const {
    // several layers of the model may attend to the keys of one
    const size_t n_times = layers.empty() ? 0 : (kv.map_layer_ids.size() + layers.size() - 1)/layers.size();

    return scores ? (uint32_t) n_times*scores->n_nodes(n_tokens) : 0;
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
    broken = false;
}

bool llama_kv_policy::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if (seq_id < 0) {
        for (uint32_t s = 0; s < kv.n_stream; ++s) {
            if (!can_rm((llama_seq_id) s, p0, p1)) {
                return false;
            }
        }
        return true;
    }

    const auto & l = ledger(seq_id);

    p0 = std::max(p0, 0);

    if (l.empty() || p0 > l.pos_last()) {
        return true;
    }

    // what was not computed can always go
    if (p1 < 0 && l.pos_placed() != llama_kv_ledger::none && p0 >= l.pos_placed()) {
        return true;
    }

    // a bounded cache drops tokens from the end only
    if (p1 >= 0 && p1 <= l.pos_last()) {
        return p1 <= l.pos_first() || p1 <= p0;
    }

    return rewind_kind(seq_id, p0) != LLAMA_KV_REWIND_IMPOSSIBLE;
}

bool llama_kv_policy::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id < 0) {
        bool res = true;
        for (uint32_t s = 0; s < kv.n_stream; ++s) {
            res = seq_rm((llama_seq_id) s, p0, p1) && res;
        }
        return res;
    }

    if (!can_rm(seq_id, p0, p1)) {
        LLAMA_LOG_DEBUG("%s: refused: [%d, %d) is no end of the sequence, or reaches back to the newest evicted position, %d\n", __func__,
                p0, p1, ledger(seq_id).evicted_max());
        return false;
    }

    const uint32_t strm = kv.seq_to_stream[seq_id];

    auto & ledger = ledgers[strm];

    if (ledger.empty() || p0 > ledger.pos_last() || (p1 >= 0 && p1 <= ledger.pos_last())) {
        return true; // nothing there
    }

    const bool undo = is_per_head() && ledger.pos_placed() != llama_kv_ledger::none && scores->lanes(strm).has_newest();

    std::vector<uint32_t> freed;
    ledger.truncate(std::max(p0, 0), freed);
    if (!frames.empty()) {
        frames[strm].truncate();
    }

    for (const uint32_t slot : freed) {
        // empty if the ubatch failed before upstream took note of it
        if (!kv.v_cells[strm].is_empty(slot)) {
            kv.v_cells[strm].rm(slot);
        }
    }

    inflight.erase(std::remove(inflight.begin(), inflight.end(), seq_id), inflight.end());

    if (!scores) {
        return true;
    }

    scores->forget_choice(strm);
    scores->forget_step();

    if (ledger.empty()) {
        scores->lanes(strm).reset();
    } else if (!undo) {
        scores->lanes(strm).drop(freed);
    } else if (scores->lanes(strm).undo(ledger.n_used() + 1, lane_moves)) {
        // the step that failed has left a hole in each lane, in a slot of its own
        std::vector<llama_kv_ledger::move> moves;
        ledger.pack(moves);

        ggml_backend_sched_synchronize(lctx->get_sched());
        broken = !copy_rows(strm, moves, ledger.n_used()) || broken;

        for (const auto & m : moves) {
            move_cell(strm, m.src, m.dst, seq_id);
            if (!frames.empty()) {
                frames[strm].move(m.src, m.dst);
            }
        }
    }

    return true;
}

llama_pos llama_kv_policy::seq_pos_min(llama_seq_id seq_id) const {
    const auto & l = ledger(seq_id);

    if (l.empty()) {
        return -1;
    }

    // heads that keep different tokens cannot go back together: the newest token that was computed is what a caller may count on
    if (is_per_head() && l.n_evicted() > 0) {
        return l.pos_placed() == llama_kv_ledger::none ? l.pos_last() : l.pos_placed() - 1;
    }

    return l.tail_first();
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

    return std::max(seq_pos_min(seq_id), pos_window);
}

llama_kv_rewind llama_kv_policy::rewind_kind(llama_seq_id seq_id, llama_pos p0) const {
    const auto & l = ledger(seq_id);

    if (l.empty() || p0 > l.pos_last() || p0 <= l.pos_first()) {
        return LLAMA_KV_REWIND_EXACT;
    }

    if (is_per_head() && l.n_evicted() > 0) {
        return LLAMA_KV_REWIND_IMPOSSIBLE;
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

    const uint32_t page = scores && scores->get_params().pages ? scores->get_params().evict_every : 0;

    if (page > 0 && (uint64_t) n_protect + l.n_recent() + 2*page - 1 > l.budget()) {
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

    const bool is_gather = spec.update == LLAMA_KV_UPDATE_GATHER;

    if (s0 == s1 || p0 > 0 || p1 >= 0 || is_gather) {
        refuse(is_gather ? "seq_cp with update=gather" : "seq_cp of a part of a sequence");
        return false;
    }

    ggml_backend_sched_synchronize(lctx->get_sched());

    ledgers[s1] = ledgers[s0];
    if (scores) {
        scores->copy(s0, s1);
    }
    if (sinks) {
        frames[s1] = frames[s0];
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
