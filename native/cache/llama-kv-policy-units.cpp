#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-move.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

// policies that score: the kept sets of layers and heads beside the ledger

bool llama_kv_policy::on_cpu() const {
    return std::all_of(layers.begin(), layers.end(), [](const auto & layer) { return llama_kv_is_cpu(ggml_backend_buffer_get_type(layer.k->buffer)); });
}

uint32_t llama_kv_policy::evict_every() const {
    const uint32_t page = formula ? formula->needs().page_size : 0;
    const uint32_t n    = page > 0 ? page : spec.evict_every > 0 ? (uint32_t) spec.evict_every : spec.desc->evict_every;

    // as many as can be candidates at once
    const auto & l = ledgers[0];

    return std::max<uint32_t>(1, std::min(n, l.budget() - l.n_protect() - l.n_recent()));
}

int64_t llama_kv_policy::score_queries() const {
    return spec.score_queries >= 0 ? spec.score_queries : on_cpu() ? 0 : llama_kv_policy_spec::SCORE_QUERIES_DEVICE;
}

void llama_kv_policy::make_filter() {
    if (spec.filter <= 0.0) {
        return;
    }
    if ((size_t) spec.filter_layers >= layers.size()) { // of layers that are there for drafts alone the cache has none
        llama_kv_policy_refuse("filter_layers is " + std::to_string(spec.filter_layers) + ": this cache has " + std::to_string(layers.size()) +
                " layers of full attention, of which the first sees every token: give less");
    }
    if (kv.map_layer_ids.size() != layers.size()) {
        llama_kv_policy_refuse("this model has layers that attend to the keys of others, which filter cannot leave a token out of: leave filter out");
    }

    filter = std::make_unique<llama_kv_filter>(llama_kv_filter::params { spec.filter, (uint32_t) spec.filter_layers, (uint32_t) spec.filter_warmup }, layers, *scores);
    scores->set_filter(filter.get());
}

std::vector<uint32_t> llama_kv_policy::take_victims(uint32_t seq, llama_pos pos0) {
    auto & ledger = ledgers[seq];
    auto & units  = scores->units(seq);
    auto & choice = scores->get_choice(seq);

    const uint32_t n_unit = units.n_unit();

    if (choice.n_left() == 0) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        if (!scores->choose(seq, scores->get_params().evict_every, candidates(seq, pos0), false)) {
            throw std::runtime_error("there is no token that may go");
        }
    }

    if (!scores->get_params().eager) {
        std::vector<uint32_t> res(n_unit);
        for (uint32_t unit = 0; unit < n_unit; ++unit) {
            res[unit] = choice.slots[(size_t) unit*choice.n + choice.i];
        }
        choice.i++;

        ledger.set_victims({ res[0] });

        return res;
    }

    // all go at once, and the tokens to come find free slots, the same in every unit
    ggml_backend_sched_synchronize(lctx->get_sched());

    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    ledger.set_victims({ choice.slots.begin(), choice.slots.begin() + choice.n });
    ledger.shrink(ledger.budget() - choice.n, victims, moves);
    if (is_pool()) {
        count_evictions(seq, victims.size());
    }

    for (const uint32_t slot : victims) {
        kv.v_cells[where.stream_of(seq)].rm(where.of(seq, slot));
    }

    if (units.evict(choice.slots, choice.n, ledger.n_used(), unit_moves) && !copy_rows(seq, moves, ledger.n_used())) {
        throw std::runtime_error("failed to move the kept rows");
    }
    move_cells(seq, moves);
    if (is_pool()) {
        keep_pages(seq);
    }

    scores->forget_choice(seq);

    return {};
}

llama_kv_scores::range llama_kv_policy::candidates(uint32_t seq, llama_pos pos_last) const {
    const auto & ledger = ledgers[seq];

    return { ledger.pos_first() + (llama_pos) ledger.n_protect(), pos_last - (llama_pos) ledger.n_recent(), ledger.n_protect() };
}

void llama_kv_policy::place_units(uint32_t seq, llama_pos pos0, const std::vector<uint32_t> & slots, const std::vector<uint32_t> & given) {
    auto & ledger = ledgers[seq];
    auto & units  = scores->units(seq);

    const auto & choice = scores->get_choice(seq);

    llama_kv_scores::seq_step st;
    st.seq  = seq;
    st.pos0 = pos0;
    st.n    = (uint32_t) slots.size();

    if (!given.empty()) {
        units.replace(pos0, given, st.unit_slots, unit_moves);
        if (gather) {
            scores->close_gaps(seq, given);
        }
    } else {
        units.put(pos0, slots);
        st.slots = slots;
        if (slots.size() > 1) {
            scores->forget_choice(seq);
        }
    }

    const bool     full   = ledger.n_used() == ledger.budget();
    const uint32_t window = formula->needs().window;

    if (slots.size() == 1) {
        // tokens to come before a choice, this one not counted
        const uint32_t left = full ? choice.n_left() : ledger.budget() - ledger.n_used();

        st.clear = window > 0 && left + 1 == window;
        st.want  = full && choice.n_left() == 0;
        st.next  = candidates(seq, pos0 + 1);
    } else {
        st.clear = window > 0 && slots.size() >= window;
    }

    step.push_back(std::move(st));
}

bool llama_kv_policy::copy_rows(uint32_t seq, const std::vector<llama_kv_ledger::move> & moves, uint32_t n_kept) {
    const uint32_t strm = where.stream_of(seq);

    const bool per_head = is_per_head();

    // where nothing lay for a while there may be no page
    if (is_pool()) {
        take_pages_of(seq, moves);
        for (const auto & of_unit : unit_moves) {
            take_pages_of(seq, of_unit);
        }
    }

    std::vector<std::vector<llama_kv_ledger::move>> rows;
    for (size_t unit = 0; per_head && unit < unit_moves.size(); ++unit) {
        rows.push_back(row_moves(seq, unit_moves[unit]));
    }

    const auto moves_of = [&](size_t i_layer, uint32_t i_head) -> const std::vector<llama_kv_ledger::move> & {
        return per_head ? rows[scores->unit_of(i_layer, i_head)] : moves;
    };

    if (scores) {
        scores->move(seq, unit_moves);
    }

    unrotated[seq] = true;

    if (gather) {
        // a formula may read the stored keys before they are rotated again
        const bool with_keys = positions && (!positions->is_ranks(seq) || (formula && (formula->needs().k_rows || formula->needs().k_unrotated || formula->needs().window > 0)));

        return gather->move(strm, moves_of, per_head, n_kept, with_keys);
    }
    if (per_head) {
        llama_kv_move_heads(layers, strm, moves_of, kv.v_trans);
        return true;
    }

    return llama_kv_move(*backends, layers, strm, row_moves(seq, moves), kv.v_trans);
}

ggml_tensor * llama_kv_policy::cpy_k(ggml_context * ctx, ggml_tensor * k_cur, int32_t il, const slot_info & sinfo) const {
    return is_single(k_cur, il, sinfo) ? scores->build_rows(ctx, k_cur, index_of(il), sinfo.s0, false) : nullptr;
}

ggml_tensor * llama_kv_policy::cpy_v(ggml_context * ctx, ggml_tensor * v_cur, int32_t il, const slot_info & sinfo) const {
    return is_single(v_cur, il, sinfo) ? scores->build_rows(ctx, v_cur, index_of(il), sinfo.s0, true) : nullptr;
}

bool llama_kv_policy::is_single(const ggml_tensor * cur, int32_t il, const slot_info & sinfo) const {
    return scores && (is_per_head() || scores->is_on_device()) && index_of(il) != SIZE_MAX && cur->ne[2] == (is_pool() ? scores->n_sharing() : sinfo.s1 - sinfo.s0 + 1);
}

void llama_kv_policy::score(ggml_context * ctx, ggml_cgraph * gf, int32_t il, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq, ggml_tensor * flash,
        ggml_tensor * mask, ggml_tensor * sinks, float scale) const {
    const size_t i = index_of(il);

    if (!scores || i == SIZE_MAX) {
        return;
    }
    if (k->view_src != layers[i].k) { // `gather`: of a copy
        scores->build_norms(ctx, gf, i);
        return;
    }

    if (k->ne[2] != layers[i].n_head_kv || (q->ne[2] % k->ne[2]) != 0) {
        llama_kv_policy_refuse("this model's attention has other KV heads than its cache, so the policy " + std::string(spec.desc->name) +
                " cannot tell their weights apart: use streaming or random");
    }

    llama_kv_scores::attention a;
    a.q        = q;
    a.k        = k;
    a.kq       = kq;
    // upstream casts f32 keys to f16 for flash attention: the weights are computed from what is stored
    a.flash    = flash && k->type != GGML_TYPE_F32 && llama_kv_policy_is_ours(flash) ? flash : nullptr;
    a.mask     = mask;
    a.sinks    = sinks;
    a.scale    = scale;
    a.soft_cap = kv.hparams.attn_soft_cap ? kv.hparams.f_attn_logit_softcapping : 0.0f;
    a.max_bias = kv.hparams.f_max_alibi_bias;
    a.is_first = (int32_t) layers[i].il == il;
    a.is_last  = il == il_last;
    a.is_last_here = il == il_last_on.at(ggml_backend_buffer_get_type(layers[i].k->buffer));

    // before the sums, which read the same softmax
    if (filter) {
        filter->gate(ctx, gf, i, kq, flash, flash && llama_kv_policy_is_ours(flash));
    }

    scores->build(ctx, gf, a, i, (uint32_t) (k->view_offs/layers[i].k->nb[2]));
}

uint32_t llama_kv_policy::n_nodes(uint32_t n_tokens) const {
    // several layers of the model may attend to the keys of one
    const size_t n_times = layers.empty() ? 0 : (kv.map_layer_ids.size() + layers.size() - 1)/layers.size();

    uint32_t res = scores ? (uint32_t) n_times*scores->n_nodes(n_tokens) : 0;

    res += filter ? (uint32_t) layers.size()*llama_kv_filter::N_NODES : 0;

    // or a copy for `gather`
    if (positions) {
        res += positions->n_nodes() + (uint32_t) layers.size()*llama_kv_gather::N_NODES_BUILD;
    }

    return res;
}

int32_t llama_kv_policy::get_head(llama_seq_id seq_id, int32_t il, int32_t i_head, llama_pos * pos, float * weight, int32_t n_max) {
    const uint32_t seq = (uint32_t) seq_id;
    const size_t   i    = index_of(il);

    if (i == SIZE_MAX || i_head < 0 || i_head >= (int32_t) layers[i].n_head_kv) {
        return -1;
    }

    catch_up(seq);

    std::vector<std::pair<llama_pos, uint32_t>> kept;

    const float * weights = nullptr;
    const float * given   = nullptr;

    if (scores) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        weights = scores->get_weights(seq, i, (uint32_t) i_head);
        given   = scores->get_given  (seq, i, (uint32_t) i_head);

        const int32_t * p = scores->units(seq).pos(scores->unit_of(i, (uint32_t) i_head));
        for (uint32_t slot = 0; slot < ledgers[seq].n_slots(); ++slot) {
            if (p[slot] != llama_kv_units::none) {
                kept.push_back({ p[slot], slot });
            }
        }
        std::sort(kept.begin(), kept.end());
    } else {
        for (const uint32_t slot : ledgers[seq].kept()) {
            kept.push_back({ ledgers[seq].pos_of(slot), slot });
        }
    }

    for (size_t j = 0; j < kept.size() && (int32_t) j < n_max; ++j) {
        if (pos) {
            pos[j] = kept[j].first;
        }
        if (weight) {
            weight[j] = weights ? weights[where.of(seq, kept[j].second)] : given ? given[kept[j].second] : 0.0f;
        }
    }

    return (int32_t) kept.size();
}

int32_t llama_kv_policy::set_scores(llama_seq_id seq_id, int32_t il, int32_t i_head, const llama_pos * pos, const float * score, int32_t n) {
    const auto refuse = [](const std::string & sentence) { throw llama_kv_policy_refusal(LLAMA_KV_POLICY_USAGE, sentence); };

    if (!scores || !scores->has_given()) {
        refuse("the policy " + std::string(spec.desc->name) + " has scores of its own: use the policy external");
    }

    const size_t i = il < 0 ? 0 : index_of(il);

    uint32_t n_head = 0; // the least that is meant has so many
    for (size_t j = 0; i != SIZE_MAX && j < layers.size(); ++j) {
        n_head = il < 0 || i == j ? std::max(n_head, layers[j].n_head_kv) : n_head;
    }
    if (il < -1 || i_head < -1 || i == SIZE_MAX || i_head >= (int32_t) n_head) {
        refuse("layer " + std::to_string(il) + " has no KV head " + std::to_string(i_head) + " under the policy: both are counted from 0, and -1 is all");
    }
    if (n < 0 || (n > 0 && (!pos || !score))) {
        refuse("no positions or no scores are given");
    }
    for (int32_t j = 0; j < n; ++j) {
        if (pos[j] < 0 || pos[j] >= llama_kv_ledger::pos_end) {
            refuse("position " + std::to_string(pos[j]) + " is none of a token: give one from 0 to " + std::to_string(llama_kv_ledger::pos_end - 1));
        }
        if (!std::isfinite(score[j])) {
            refuse("the score of the token at position " + std::to_string(pos[j]) + " is not a finite number");
        }
    }

    ggml_backend_sched_synchronize(lctx->get_sched());

    const uint32_t seq = (uint32_t) seq_id;

    return (int32_t) scores->set_given(seq, il < 0 ? -1 : (int32_t) i, i_head, pos, score, (uint32_t) n, ledgers[seq].empty() ? -1 : ledgers[seq].pos_last());
}

int32_t llama_kv_policy::get_shares(llama_seq_id seq_id, llama_pos * pos, float * share, int32_t n_max) const {
    catch_up((uint32_t) seq_id);

    const auto & units = scores->units((uint32_t) seq_id);

    std::map<llama_pos, uint32_t> count;
    for (uint32_t unit = 0; unit < units.n_unit(); ++unit) {
        for (uint32_t slot = 0; slot < units.n_slots(); ++slot) {
            if (units.pos(unit)[slot] != llama_kv_units::none) {
                count[units.pos(unit)[slot]]++;
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
                share[n] = (float) c/units.n_unit();
            }
        }
        n++;
    }

    return n;
}
