#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-move.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

//
// llama_kv_policy
//

llama_kv_policy::llama_kv_policy(llama_kv_cache & kv, const llama_kv_policy_spec & spec, uint32_t budget, uint32_t n_ubatch, uint32_t n_seq) :
    kv(kv), spec(spec), budget(budget),
    pool(spec.pool > 0 ? std::make_unique<llama_kv_pool>((uint32_t) spec.pool, n_ubatch, n_seq, budget + n_ubatch) : nullptr), where { pool.get() }, evicted_pool(n_seq, 0), is_given(n_seq, false),
    ledgers(pool ? n_seq : kv.n_stream /* one sequence each */, llama_kv_ledger(pool ? budget + n_ubatch : kv.get_size(), budget, (uint32_t) spec.sinks,
                spec.n_recent(budget), spec.desc->victim && !spec.has_formula() ? spec.desc->victim() : nullptr, spec.update == LLAMA_KV_UPDATE_GATHER)),
    arrivals(ledgers.size()), conditions(ledgers.size()), unrotated(ledgers.size(), false) {
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

    if (spec.has_formula() && !layers.empty()) {
        formula = spec.make_formula();

        const std::string scope = spec.get_scope();

        llama_kv_scores::params p;
        p.scope       = scope == "token" ? LLAMA_KV_SCOPE_TOKEN : scope == "layer" ? LLAMA_KV_SCOPE_LAYER : LLAMA_KV_SCOPE_HEAD;
        p.n_queries   = score_queries() > 0 ? (uint32_t) score_queries() : UINT32_MAX;
        p.evict_every = evict_every();
        p.eager       = spec.desc->eager || formula->needs().page_size > 0;
        p.compact     = spec.update == LLAMA_KV_UPDATE_GATHER;
        p.v_trans     = kv.v_trans;
        p.n_ubatch    = cparams.n_ubatch;
        p.n_sinks     = (uint32_t) spec.sinks;
        p.filters     = spec.filter > 0.0;
        p.ranks       = spec.positions != LLAMA_KV_POSITIONS_TRUE && !p.compact;

        if (formula->needs().k_unrotated) {
            rope_formula = std::make_unique<llama_kv_rope>(hadamard_of(kv));
            p.rope    = rope_formula.get();
        }

        il_last = 0;
        for (const auto & [il, i] : kv.map_layer_ids) {
            il_last = std::max(il_last, il);

            auto & last = il_last_on[ggml_backend_buffer_get_type(layers[i].k->buffer)];
            last = std::max(last, il);
        }

        scores = std::make_unique<llama_kv_scores>(*formula, p, layers, where, ledgers[0].n_slots(), n_seq(), kv.n_stream, hadamard_of(kv, true));
        make_filter();
    }

    if (spec.positions != LLAMA_KV_POSITIONS_TRUE) {
        llama_kv_positions::params p;
        p.frame.ranks        = spec.positions == LLAMA_KV_POSITIONS_CACHE;
        p.frame.is_auto      = spec.positions == LLAMA_KV_POSITIONS_AUTO;
        p.frame.n_ctx_train  = kv.hparams.n_ctx_train;
        p.frame.n_sinks      = (uint32_t) spec.sinks;
        p.frame.rotate_every = rotate_every();

        if (const char * text = getenv("LLAMA_KV_REBASE_AT")) { // tests: sooner than after 65536 tokens
            p.frame.rebase_at = std::max(1, atoi(text));
        }

        p.is_gather = spec.update == LLAMA_KV_UPDATE_GATHER;
        p.had       = hadamard_of(kv);
        if (kv_swa) {
            p.had_swa    = hadamard_of(*kv_swa);
            p.layers_swa = layers_of(*kv_swa);
        }

        positions = std::make_unique<llama_kv_positions>(std::move(p), lctx, layers, kv_swa, where, ledgers[0].n_slots(), n_seq(), scores.get());
    }
}

void llama_kv_policy::observe_k(const ggml_tensor * k_cur, int32_t il) {
    if (rope_formula && llama_kv_has_layer(layers, il) && (!rope_formula->observe((uint32_t) il, k_cur) || !rope_formula->is_linear((uint32_t) il))) {
        llama_kv_policy_refuse("this model has keys that are changed after their rotation, and the policy " + std::string(spec.desc->name) +
                " reads keys without it: use another policy");
    }
    if (positions && !positions->observe(k_cur, il)) {
        llama_kv_policy_refuse("this model has keys that are changed after their rotation, so positions=" + std::string(positions_name()) +
                " is not possible: use positions=true");
    }
}

bool llama_kv_policy::prepare_layers() {
    try {
        if (!is_prepared) {
            if (rope_formula) {
                rope_formula->prepare_undo();
            }
            if (spec.update == LLAMA_KV_UPDATE_GATHER) {
                gather = std::make_unique<llama_kv_gather>(positions ? &positions->get_rope() : nullptr, *backends, layers, kv.n_stream,
                        lctx->get_cparams().n_ubatch, kv.v_trans);
            }
            is_prepared = true;
        }
        if (positions && !positions->is_prepared()) {
            uint32_t n_protect = 0;
            for (const auto & ledger : ledgers) {
                n_protect = std::max(n_protect, ledger.n_protect());
            }
            positions->prepare(n_protect);
        }
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return false;
    }

    return true;
}

const llama_kv_ledger & llama_kv_policy::ledger(llama_seq_id seq_id) const {
    catch_up((uint32_t) seq_id);

    return ledgers[seq_id];
}

size_t llama_kv_policy::get_key(llama_seq_id seq_id, int32_t il, llama_pos pos, void * data, size_t size) const {
    const uint32_t seq = (uint32_t) seq_id;

    for (const uint32_t slot : ledger(seq_id).kept()) {
        if (ledgers[seq].pos_of(slot) != pos) {
            continue;
        }
        for (const auto & layer : layers) {
            if ((int32_t) layer.il == il) {
                const ggml_tensor * k = layer.k_stream[where.stream_of(seq)];

                if (data && size >= k->nb[1]) {
                    ggml_backend_sched_synchronize(lctx->get_sched());
                    ggml_backend_tensor_get(k, data, where.of(seq, slot)*k->nb[1], k->nb[1]);
                }
                return k->nb[1];
            }
        }
    }

    return 0;
}

int32_t llama_kv_policy::get_delta(llama_seq_id seq_id) const {
    const uint32_t seq = (uint32_t) seq_id;

    return !positions || ledger(seq_id).empty() ? 0 : positions->delta(seq, ledgers[seq]);
}

uint32_t llama_kv_policy::rotate_every() const {
    return spec.rotate_every > 0 ? (uint32_t) spec.rotate_every : spec.default_rotate_every(has_quantized_keys());
}

const char * llama_kv_policy::positions_name() const {
    return spec.positions_name();
}

bool llama_kv_policy::is_ranks(llama_seq_id seq_id) const {
    return positions && positions->is_ranks((uint32_t) seq_id);
}

int64_t llama_kv_policy::n_rotations(llama_seq_id seq_id) const {
    return positions ? positions->n_batches((uint32_t) seq_id) : 0;
}

llama_kv_traffic llama_kv_policy::get_traffic() const {
    llama_kv_traffic res = positions ? positions->get_traffic() : llama_kv_traffic();
    if (scores) {
        res.n_reads  += scores->get_traffic().n_reads;
        res.n_writes += scores->get_traffic().n_writes;
    }
    if (filter) {
        res.n_reads  += filter->get_traffic().n_reads;
        res.n_writes += filter->get_traffic().n_writes;
    }
    return res;
}

llama_kv_policy::slot_info_vec_t llama_kv_policy::prepare(const std::vector<llama_ubatch> & ubatches) const {
    slot_info_vec_t res;

    for (const auto & ubatch : ubatches) {
        if (is_pool()) {
            if (!ubatch.equal_seqs()) {
                return {};
            }
            if (std::any_of(ubatch.n_seq_id, ubatch.n_seq_id + ubatch.n_tokens, [](int32_t n) { return n != 1; })) {
                LLAMA_LOG_ERROR("llama_kv_policy: a token of several sequences: a pool takes one sequence per token\n");
                return {};
            }
            slot_info sinfo = { 0, 0, { 0 }, {} };
            sinfo.resize(1);
            sinfo.strm[0] = 0;
            sinfo.idxs[0].resize(ubatch.n_tokens);
            res.push_back(std::move(sinfo));
            continue;
        }

        const uint32_t n_seqs = kv.n_stream > 1 ? ubatch.n_seqs_unq : 1;

        slot_info sinfo = { LLAMA_MAX_SEQ, 0, {}, {} };
        sinfo.resize(n_seqs);

        for (uint32_t s = 0; s < n_seqs; ++s) {
            const uint32_t seq  = (uint32_t) ubatch.seq_id_unq[s];
            const uint32_t strm = where.stream_of(seq);

            // between ubatches at most `budget` slots are taken: a ubatch that fits the headroom always fits
            if (ubatch.n_tokens/n_seqs > ledgers[seq].n_slots() - ledgers[seq].budget()) {
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
bool llama_kv_policy::accepts(uint32_t seq, const llama_pos * pos, uint32_t n) {
    const auto & ledger = ledgers[seq];

    const auto refuse = [&](const std::string & sentence) {
        LLAMA_LOG_ERROR("llama_kv_policy: sequence %u, position %d: %s\n", seq, pos[0], sentence.c_str());
        return false;
    };

    if (conditions[seq].lost) {
        return refuse("a failed step has left the cache of this sequence incomplete: clear it and read the text again");
    }
    if (conditions[seq].poisoned && pos[0] > 0) {
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
    if (!ledger.empty() && pos[0] != pos_last(seq) + 1) {
        return refuse("the newest token of the sequence stands at position " + std::to_string(pos_last(seq)));
    }

    return true;
}

bool llama_kv_policy::apply(slot_info & sinfo, const llama_ubatch & ubatch) {
    const int64_t t_start = ggml_time_us();

    const uint32_t n_seqs = is_pool() ? ubatch.n_seqs : sinfo.n_stream();
    const uint32_t n      = ubatch.n_tokens/n_seqs; // tokens per sequence

    // tokens of a sequence lie together
    const auto seq_of = [&](uint32_t s) { return is_pool() ? (uint32_t) ubatch.seq_id[s*n][0] : (uint32_t) ubatch.seq_id_unq[s]; };

    // a ubatch that was neither computed nor removed
    for (const uint32_t seq : inflight) {
        conditions[seq].lost = true;
    }
    inflight.clear();

    for (uint32_t s = 0; s < n_seqs; ++s) {
        if (!accepts(seq_of(s), ubatch.pos + s*n, n)) {
            return false;
        }
    }

    try {
        if (!prepare_layers()) {
            return false;
        }
        const bool is_ahead = can_run_ahead(ubatch);

        for (uint32_t s = 0; s < n_seqs; ++s) {
            if (!is_ahead) {
                catch_up(seq_of(s), n == 1);
            }
            if (conditions[seq_of(s)].lost) {
                return false;
            }
            settle_placed(seq_of(s));
        }
        for (uint32_t s = 0; is_pool() && s < n_seqs; ++s) {
            make_room(seq_of(s), n);
        }

        step.clear();
        if (positions) {
            positions->begin(ubatch);
        }
        if (is_ahead) {
            run_ahead(ubatch);
        }
        for (uint32_t s = 0; s < n_seqs && !is_ahead; ++s) {
            const uint32_t seq = seq_of(s);

            std::vector<uint32_t>              slots(n);
            std::vector<llama_kv_ledger::move> moves;

            // what goes wrong on the way leaves the books ahead of the data
            conditions[seq] = { /*.poisoned =*/ false, /*.lost =*/ true };

            place(seq, ubatch.pos[s*n], slots, moves);
            fill (seq, ubatch.pos[s*n], slots, moves, s*n, ubatch);

            const auto rows = where.of(seq, slots);
            std::copy(rows.begin(), rows.end(), is_pool() ? sinfo.idxs[0].begin() + s*n : sinfo.idxs[s].begin());

            conditions[seq].lost = false;
        }
        set_inputs(sinfo, ubatch);

        // upstream's cells would have to know the slot; that it is taken, and by something earlier, they know
        if (!is_ahead) {
            kv.apply_ubatch(sinfo, ubatch);
        }
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        for (const uint32_t seq : inflight) {
            conditions[seq].lost = true;
        }
        return false;
    }

    n_steps++;
    t_host_us += ggml_time_us() - t_start;

    return true;
}

void llama_kv_policy::place(uint32_t seq, llama_pos pos0, std::vector<uint32_t> & slots, std::vector<llama_kv_ledger::move> & moves) {
    const uint32_t n = (uint32_t) slots.size();

    auto & ledger = ledgers[seq];

    std::vector<uint32_t> victims;
    std::vector<uint32_t> given; // [n_unit] victims of this token

    if (scores && n == 1 && ledger.n_used() == ledger.budget() && pos0 == ledger.pos_last() + 1) {
        given = take_victims(seq, pos0);
    }

    if (!ledger.place(pos0, n, slots, victims, moves)) {
        throw std::runtime_error("no room for " + std::to_string(n) + " tokens");
    }
    inflight.push_back(seq);

    // upstream's apply_ubatch purges what lies before an overwritten cell; an empty cell has nothing to purge
    for (const uint32_t slot : victims) {
        kv.v_cells[where.stream_of(seq)].rm(where.of(seq, slot));
    }
    if (is_pool()) {
        count_evictions(seq, victims.size());
        take_pages(seq, slots);
    }

    unit_moves.clear();
    if (scores) {
        place_units(seq, pos0, slots, given);
    }
}

void llama_kv_policy::fill(uint32_t seq, llama_pos pos0, const std::vector<uint32_t> & slots, const std::vector<llama_kv_ledger::move> & moves,
        uint32_t i_tok, const llama_ubatch & ubatch) {
    const auto & ledger = ledgers[seq];

    const uint32_t n_kept = ledger.n_used() - (uint32_t) slots.size();

    if (gather && !moves.empty()) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        if (!copy_rows(seq, moves, n_kept)) {
            throw std::runtime_error("failed to copy the kept tokens");
        }
        move_cells(seq, moves);
    }

    if (positions) {
        const auto plan = positions->place(seq, ledger, pos0, slots, i_tok, ubatch);

        if (gather) {
            rotate_gathered(seq, plan, n_kept);
        }
    } else {
        warn_far(seq, pos0);
    }

    if (scores && scores->has_stands()) {
        scores->set_stands(step.back(), positions ? positions->base(seq) : 0);
    }
    if (scores && positions && scores->wants_debts(step.back())) {
        step.back().debts = positions->debts(seq, ledger);
    }
}

void llama_kv_policy::rotate_gathered(uint32_t seq, const llama_kv_frame::plan & plan, uint32_t n_kept) {
    if (!positions->is_ranks(seq) || !(unrotated[seq] || plan.rebased || plan.switched)) {
        return;
    }

    const int32_t first = positions->first(seq, ledgers[seq]);

    if (!gather->rotate(where.stream_of(seq), first, n_kept)) {
        throw std::runtime_error("failed to rotate the kept tokens");
    }
    unrotated[seq] = false;

    for (uint32_t i = 0; scores && scores->has_stands() && i < n_kept; ++i) {
        scores->set_stand(seq, i, first + (int32_t) i);
    }
}

void llama_kv_policy::warn_far(uint32_t seq, llama_pos pos0) {
    if (!warned_far && (uint32_t) (pos0 - ledgers[seq].pos_first()) >= kv.hparams.n_ctx_train) {
        warned_far = true;
        LLAMA_LOG_WARN("%s: position %d is past the trained context of %u tokens; with positions=true the kept tokens are now further away than the model has seen\n",
                __func__, pos0, kv.hparams.n_ctx_train);
    }
}

void llama_kv_policy::set_inputs(const slot_info & sinfo, const llama_ubatch & ubatch) {
    if (scores) {
        if (!scores->is_on_cpu()) {
            ggml_backend_sched_synchronize(lctx->get_sched());
        }
        scores->set_step(step);
    }
    if (filter) {
        filter->set_step(!step[0].unit_slots.empty(), step[0].n);
    }

    if (gather && positions) {
        const uint32_t n = (uint32_t) sinfo.size();

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

void llama_kv_policy::commit() {
    // an attention of another kind, which stores keys that nobody has seen: better no answer than a wrong one
    bool ok = !positions || positions->is_complete();
    if (!ok) {
        LLAMA_LOG_ERROR("%s: the keys of %zu of %zu layers were seen: this model cannot have positions=%s, use positions=true\n", __func__,
                positions->get_n_seen(), positions->get_n_rope_layers(), positions_name());
    }

    if (filter && filter->may_be_skipped() && !scores->is_on_cpu()) {
        ggml_backend_sched_synchronize(lctx->get_sched());
        filter->read_gates();
    }
    if (scores && !scores->commit()) {
        LLAMA_LOG_ERROR("%s: no memory to choose the tokens that go\n", __func__);
        ok = false;
    }
    if (filter) {
        filter->commit();
    }

    for (const uint32_t seq : inflight) {
        conditions[seq].lost = !ok;
    }

    // the evictions that a chunk owes wait for the next ubatch: until then its tokens can still be taken back
    inflight.clear();
}

void llama_kv_policy::settle(llama_seq_id seq_id) {
    catch_up((uint32_t) seq_id);
    settle_placed((uint32_t) seq_id);
}

void llama_kv_policy::settle_placed(uint32_t seq) {
    auto & ledger = ledgers[seq];

    if (ledger.pos_placed() == llama_kv_ledger::none || conditions[seq].lost || std::find(inflight.begin(), inflight.end(), seq) != inflight.end()) {
        return;
    }

    // what goes wrong on the way leaves the books ahead of the data
    conditions[seq].lost = true;

    const uint32_t n_over = ledger.n_used() - std::min(ledger.n_used(), ledger.budget());

    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    unit_moves.clear();
    if (scores && n_over > 0) {
        ggml_backend_sched_synchronize(lctx->get_sched());

        if (!scores->choose(seq, n_over, candidates(seq, ledger.pos_last()), true)) {
            throw std::runtime_error("there are fewer tokens that may go than have to");
        }

        const auto & choice = scores->get_choice(seq);

        ledger.set_victims({ choice.slots.begin(), choice.slots.begin() + n_over });
    }

    ledger.commit(victims, moves);
    if (is_pool()) {
        count_evictions(seq, victims.size());
    }

    for (const uint32_t slot : victims) {
        kv.v_cells[where.stream_of(seq)].rm(where.of(seq, slot));
    }

    bool any = !moves.empty();
    if (scores && n_over > 0) {
        any = scores->units(seq).evict(scores->get_choice(seq).slots, n_over, ledger.budget(), unit_moves);
        scores->forget_choice(seq);
    }

    if (any) {
        ggml_backend_sched_synchronize(lctx->get_sched());

        if (!copy_rows(seq, moves, ledger.n_used())) {
            throw std::runtime_error("failed to move the kept rows");
        }
        move_cells(seq, moves);
    }
    if (is_pool()) {
        keep_pages(seq);
    }

    conditions[seq].lost = false;
}

void llama_kv_policy::move_cells(uint32_t seq, const std::vector<llama_kv_ledger::move> & moves) {
    auto & cells = kv.v_cells[where.stream_of(seq)];

    for (const auto & m : moves) {
        const uint32_t src = where.of(seq, m.src);
        const uint32_t dst = where.of(seq, m.dst);

        const llama_pos         pos = cells.pos_get(src);
        const llama_kv_cell_ext ext = cells.ext_get(src);

        cells.rm(src);
        cells.pos_set(dst, pos);
        cells.ext_set(dst, ext);
        cells.seq_add(dst, (llama_seq_id) seq);

        if (positions) {
            positions->move(seq, m.src, m.dst);
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

    const bool is_mine = llama_kv_has_layer(layers, il);

    if (filter && is_mine) {
        filter->build(ctx, gf, k_cur, v_cur, index_of(il));
    }
    if (scores && is_mine) {
        scores->set_written(k_cur, v_cur, index_of(il), sinfo.s0, sinfo.s1 - sinfo.s0 + 1);
    }

    if (!is_mine || is_reserve) {
        return;
    }

    if (positions) {
        positions->build(ctx, gf, k_cur, il);
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
    if (filter) {
        filter->reset();
    }
    for (auto & ledger : ledgers) {
        ledger.reset();
    }
    arrivals.assign(ledgers.size(), {});
    if (positions) {
        positions->clear();
    }
    for (uint32_t seq = 0; is_pool() && seq < n_seq(); ++seq) {
        set_allotment(seq, 0);
        keep_pages(seq);
    }

    inflight.clear();
    conditions.assign(ledgers.size(), {});
}
