#include "llama-kv-positions.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-rotate.h"
#include "llama-kv-state-io.h"

#include <algorithm>
#include <stdexcept>

llama_kv_positions::llama_kv_positions(params p, const llama_context & lctx, const std::vector<llama_kv_layer> & layers, const llama_kv_cache * kv_swa,
        const llama_kv_where & where, uint32_t n_slots, uint32_t n_seq, llama_kv_scores * scores) :
    rule(p.frame), is_gather(p.is_gather), lctx(lctx), layers(layers), layers_swa(std::move(p.layers_swa)), kv_swa(kv_swa), scores(scores),
    where(where), n_seq(n_seq), frames(n_seq, llama_kv_frame(n_slots, rule)), rope(std::move(p.had)), rope_swa(std::move(p.had_swa)),
    backends_pins(lctx.get_cparams().n_threads_batch), backends_rotations(lctx.get_cparams().n_threads_batch) {
}

bool llama_kv_positions::observe(const ggml_tensor * k_cur, int32_t il) {
    auto & to = llama_kv_has_layer(layers_swa, il) ? rope_swa : rope;

    return to.observe((uint32_t) il, k_cur);
}

void llama_kv_positions::prepare(uint32_t n_protect) {
    n_rope_layers = 0;
    for (const auto & layer : layers) {
        n_rope_layers += rope.has(layer.il);
    }

    if (!is_gather) {
        auto made = std::make_unique<llama_kv_sinks>(rope, backends_pins, layers, where, n_seq);
        made->resize(n_protect);
        sinks = std::move(made);
    }

    prepared = true;
}

//
// one ubatch
//

void llama_kv_positions::begin(const llama_ubatch & ubatch) {
    captures.clear();
    rewrites.clear();

    n_seen = 0;

    if (ubatch.data) {
        ubatch.data->pos_model.clear();
        ubatch.data->pos_rank .clear();
    }
}

llama_kv_frame::plan llama_kv_positions::place(uint32_t seq, const llama_kv_ledger & ledger, llama_pos pos0, const std::vector<uint32_t> & slots,
        uint32_t i_tok, const llama_ubatch & ubatch) {
    const uint32_t n = (uint32_t) slots.size();

    auto plan = frames[seq].place(ledger, pos0, slots, is_gather || (scores && scores->is_per_head()), is_any_interior());

    if (plan.switched) {
        LLAMA_LOG_WARN("%s: position %d is past the trained context of %u tokens: from here on a token's position is its rank in the cache\n",
                __func__, pos0, rule.n_ctx_train);
    }

    if (scores && plan.rebased) {
        scores->forget_queries(seq, INT32_MIN); // they stand in the old frame
    }

    if (!rotate(seq, ledger, plan, pos0)) {
        throw std::runtime_error("failed to rotate the kept tokens");
    }

    if (is_per_head()) {
        scores->units(seq).set_recording(frames[seq].is_ranks());
    }

    set_positions(seq, ledger.gap(), i_tok, n, ubatch);

    const int32_t rank = pos0 - ledger.pos_first();
    if (sinks && rank < (int32_t) ledger.n_protect()) {
        captures.push_back({ seq, i_tok, (uint32_t) rank, std::min<uint32_t>(n, ledger.n_protect() - rank) });
    }

    return plan;
}

bool llama_kv_positions::can_place_ahead(uint32_t seq, const llama_kv_ledger & ledger, llama_pos pos0, uint32_t n_ahead) {
    llama_kv_frame::plan plan;

    return prepared && frames[seq].plan_ahead(ledger, pos0, n_ahead, is_any_interior(), scores->has_debts(rope), plan);
}

bool llama_kv_positions::place_ahead(uint32_t seq, const llama_kv_ledger & ledger, llama_pos pos0, uint32_t n_ahead, uint32_t i_tok, const llama_ubatch & ubatch) {
    llama_kv_frame::plan plan;

    bool ok = frames[seq].plan_ahead(ledger, pos0, n_ahead, is_any_interior(), scores->has_debts(rope), plan);

    if (ok && (plan.rotating || plan.n_sinks > 0)) {
        ggml_backend_sched_synchronize(lctx.get_sched());

        ok = (!plan.rotating || scores->rotate_debts(seq, rope, backends_rotations)) && (!sinks || rotate_protected(seq, ledger, plan));
    }
    if (!ok) {
        throw std::runtime_error("failed to rotate the kept tokens");
    }
    frames[seq].place_ahead(ledger, n_ahead, plan);

    // (all of its slots are taken: what is kept grows no more)
    set_positions(seq, pos0 + 1 - ledger.pos_first() - (int32_t) ledger.n_used(), i_tok, 1, ubatch);

    return plan.rotating;
}

bool llama_kv_positions::rotate(uint32_t seq, const llama_kv_ledger & ledger, const llama_kv_frame::plan & plan, llama_pos pos0) {
    const bool rotates_units = is_per_head() && plan.rotating;

    if (plan.rebased == 0 && plan.n_sinks == 0 && !plan.pinned && plan.rotations.empty() && !rotates_units) {
        return true;
    }

    ggml_backend_sched_synchronize(lctx.get_sched());

    if (plan.rebased && kv_swa && !rotate_window(seq, -plan.rebased)) {
        return false;
    }

    if (scores && plan.rotating) {
        scores->forget_debts(seq);
    }
    if (rotates_units) {
        if (!rotate_units(seq, ledger, plan, pos0)) {
            return false;
        }
    } else {
        auto rotations = plan.rotations;
        for (auto & t : rotations) {
            t.slot = where.of(seq, t.slot);
        }
        if (!llama_kv_rotate(rope, backends_rotations, layers, where.stream_of(seq), rotations)) {
            return false;
        }
        if (has_stands()) {
            scores->rotate_stands(seq, 0, plan.rotations);
        }
    }

    return !sinks || rotate_protected(seq, ledger, plan);
}

// the keys of the sliding window beside this cache, all of them
bool llama_kv_positions::rotate_window(uint32_t seq, int32_t delta) {
    const auto & cells = kv_swa->get_cells((llama_seq_id) seq);

    std::vector<llama_kv_frame::rotation> rotations;
    for (uint32_t i = 0; i < kv_swa->get_size(); ++i) {
        if (cells.seq_has(i, (llama_seq_id) seq)) {
            rotations.push_back({ i, delta });
        }
    }

    return llama_kv_rotate(rope_swa, backends_rotations, layers_swa, where.stream_of(seq), rotations);
}

// equal deltas side by side, and in the order of the slots within; most have one of a few deltas
// by_row: [n_slots, rows of single heads] the delta, 0 = none; becomes all zeros
static void sort_rotations(std::vector<int32_t> & by_row, std::vector<llama_kv_rotation> & res) {
    static constexpr int32_t N_COUNTS = 1024;

    const auto [min, max] = std::minmax_element(by_row.begin(), by_row.end());

    const int64_t lo = *min;
    const int64_t hi = *max;

    res.clear();
    if (hi - lo >= N_COUNTS) {
        for (size_t row = 0; row < by_row.size(); ++row) {
            if (by_row[row] != 0) {
                res.push_back({ (uint32_t) row, by_row[row] });
            }
        }
        std::sort(res.begin(), res.end());
    } else {
        std::vector<uint32_t> at(hi - lo + 2, 0); // where the next one of a delta goes
        for (const int32_t delta : by_row) {
            at[delta - lo + 1] += delta != 0;
        }
        for (size_t i = 1; i < at.size(); ++i) {
            at[i] += at[i - 1];
        }
        res.resize(at.back());
        for (size_t row = 0; row < by_row.size(); ++row) {
            if (by_row[row] != 0) {
                res[at[by_row[row] - lo]++] = { (uint32_t) row, by_row[row] };
            }
        }
    }
    std::fill(by_row.begin(), by_row.end(), 0);
}

// every head by the ranks in its own kept set
bool llama_kv_positions::rotate_units(uint32_t seq, const llama_kv_ledger & ledger, const llama_kv_frame::plan & plan, llama_pos pos0) {
    auto & units = scores->units(seq);

    const llama_pos pos_min = ledger.pos_first() + (llama_pos) ledger.n_protect();

    std::vector<std::vector<llama_kv_rotation>> rotations(layers.size());
    std::vector<llama_kv_rotation>              cur;
    std::vector<int32_t>                        by_row;

    for (size_t i = 0; i < layers.size(); ++i) {
        by_row.resize((size_t) units.n_slots()*layers[i].n_head_kv);

        for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
            if (h == 0 || scores->get_params().scope == LLAMA_KV_SCOPE_HEAD) {
                const uint32_t unit = scores->unit_of(i, h);

                cur = plan.switched ? units.rotations_from_true(unit, pos_min, ledger.pos_last()) : units.rotations(unit, pos_min, pos0, plan.rebased);

                if (has_stands()) {
                    scores->rotate_stands(seq, unit, cur);
                }
            }
            for (const auto & t : cur) {
                by_row[(size_t) t.slot*layers[i].n_head_kv + h] = t.delta;
            }
        }

        sort_rotations(by_row, rotations[i]);

        for (auto & t : rotations[i]) {
            t.slot = where.of(seq, t.slot/layers[i].n_head_kv)*layers[i].n_head_kv + t.slot % layers[i].n_head_kv;
        }
    }

    return llama_kv_rotate_heads(rope, backends_rotations, layers, where.stream_of(seq), rotations);
}

// from their originals
bool llama_kv_positions::rotate_protected(uint32_t seq, const llama_kv_ledger & ledger, const llama_kv_frame::plan & plan) {
    const uint32_t n_sinks = rule.n_sinks;

    std::vector<uint32_t> slots;
    for (uint32_t i = 0; i < ledger.n_protect() && ledger.slot_of_first(i) >= 0; ++i) {
        slots.push_back((uint32_t) ledger.slot_of_first(i));
    }

    // the originals, and so what is rewritten from them, stand one position apart
    for (uint32_t i = 0; has_stands() && i < slots.size(); ++i) {
        if (i < plan.n_sinks || (plan.pinned && i >= n_sinks)) {
            scores->set_stand(seq, slots[i], frames[seq].first(ledger) + (int32_t) i);
        }
    }

    slots = where.of(seq, slots);

    if (plan.n_sinks > 0) {
        if (!sinks->rewrite(seq, plan.delta, slots.data(), plan.n_sinks)) {
            return false;
        }
        if (sinks->any_in_graph()) {
            rewrites.push_back({ seq, 0, 0, plan.n_sinks });
        }
    }

    return !plan.pinned || sinks->rewrite_many(seq, plan.delta, n_sinks, slots.data() + n_sinks, (uint32_t) slots.size() - n_sinks);
}

// where they are not the caller's
void llama_kv_positions::set_positions(uint32_t seq, int32_t gap, uint32_t i_tok, uint32_t n, const llama_ubatch & ubatch) const {
    const auto & frame = frames[seq];

    if (!frame.is_ranks() || !ubatch.data || gap == 0) {
        return;
    }

    auto & data = *ubatch.data;

    if (data.pos_rank.empty()) {
        data.pos_model.assign(ubatch.pos, ubatch.pos + ubatch.n_tokens);
        data.pos_rank .assign(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    }
    for (uint32_t i = i_tok; i < i_tok + n; ++i) {
        data.pos_model[i] -= frame.base();
        data.pos_rank [i] -= gap;
    }
}

void llama_kv_positions::build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, int32_t il) {
    if (n_seen == 0) {
        built.captures = !captures.empty();
        built.rewrites = rewrites;
    }
    n_seen += rope.has(il);

    for (const auto & c : captures) {
        ggml_tensor * keys = ggml_view_2d(ctx, k_cur, k_cur->ne[0]*k_cur->ne[1], c.n, k_cur->nb[2], c.i_tok*k_cur->nb[2]);

        sinks->capture(ctx, gf, keys, il, c.seq, c.rank);
    }

    for (const auto & r : rewrites) {
        if (sinks->in_graph(il)) {
            sinks->build(ctx, gf, il, r.seq, r.n);
        }
    }
}

// per layer and sequence: the originals of its protected tokens are captured, and its sinks rewritten
//   (the rotations are not known yet: every layer may have one)
uint32_t llama_kv_positions::n_nodes() const {
    return (uint32_t) (layers.size()*n_seq*(llama_kv_sinks::N_NODES_CAPTURE + llama_kv_sinks::N_NODES_BUILD));
}

bool llama_kv_positions::can_reuse() const {
    return captures.empty() && !built.captures && std::equal(rewrites.begin(), rewrites.end(), built.rewrites.begin(), built.rewrites.end(),
            [](const tokens & a, const tokens & b) { return a.seq == b.seq && a.n == b.n; });
}

//
// sequences
//

void llama_kv_positions::clear() {
    for (auto & frame : frames) {
        frame.reset();
    }
}

void llama_kv_positions::copy(uint32_t src, uint32_t dst) {
    if (sinks) {
        frames[dst] = frames[src];
        sinks->copy(src, dst);
    }
}

bool llama_kv_positions::resize(uint32_t n_protect) {
    ggml_backend_sched_synchronize(lctx.get_sched());
    try {
        sinks->resize(n_protect);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        sinks.reset(); // made anew, as it was, for the next ubatch
        prepared = false;
        return false;
    }

    return true;
}

void llama_kv_positions::state_reserve(uint32_t n_protect) {
    if (!is_short(n_protect)) {
        return;
    }

    ggml_backend_sched_synchronize(lctx.get_sched());
    try {
        sinks->grow(n_protect);
    } catch (const std::exception &) {
        if (sinks->get_n() == 0) {
            sinks.reset(); // made anew, as it was, for the next ubatch
            prepared = false;
        }
        throw;
    }
    built.captures = true; // no graph that was built before is given again
}

// protected tokens that have come: as many originals are there
static uint32_t n_originals(const llama_kv_ledger::image & im) {
    return (uint32_t) std::min<int64_t>(im.n_protect, (int64_t) im.pos_last - im.pos_first + 1);
}

void llama_kv_positions::state_write(llama_kv_state_writer & out, uint32_t seq, const llama_kv_ledger::image & ledger,
        const std::vector<uint32_t> & slots) const {
    const auto f = frames[seq].get_image(slots);

    out.num((uint8_t) f.ranks);
    out.num((uint8_t) f.dirty);
    out.num(f.base);
    out.num(f.origin);
    out.num(f.delta_pinned);
    out.num(f.n_interior);
    out.num(f.n_batches);
    out.nums(f.at);

    if (sinks) {
        sinks->state_write(out, seq, n_originals(ledger));
    }
}

bool llama_kv_positions::state_read(llama_kv_state_reader & in, uint32_t seq, const llama_kv_ledger::image & ledger, const std::vector<uint32_t> & slots,
        bool is_check) {
    llama_kv_frame::image f;

    f.ranks        = in.flag();
    f.dirty        = in.flag();
    f.base         = in.num<int32_t>();
    f.origin       = in.num<int32_t>();
    f.delta_pinned = in.num<int32_t>();
    f.n_interior   = in.num<int64_t>();
    f.n_batches    = in.num<int64_t>();
    f.at           = in.nums<int32_t>(slots.size());

    if (!frames[seq].is_possible(ledger, f)) {
        llama_kv_state_corrupt("positions");
    }
    // counted otherwise where it was saved
    f.dirty = f.dirty || (!is_any_interior() && f.n_interior > ledger.n_interior);

    if (!is_check) {
        frames[seq].set_image(slots, f);
    }

    if (sinks) {
        sinks->state_read(in, seq, n_originals(ledger), is_check);
    }

    return f.ranks;
}
