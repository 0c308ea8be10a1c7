#include "equip-internal.h"

#include "llama-kv-policy-spec.h"

#include <algorithm>
#include <functional>

// update=shift, a baseline: llama.cpp's own context shift, one call of seq_rm and one of seq_add per eviction, on a cache of
// the same size that has no policy. The next llama_decode runs the K-shift. A token's position is its rank at all times, so
// the compact ledger's slot, which is the rank too, names it.

std::unique_ptr<llama_kv_ledger> equip_make_shift(const equip_session_params & p) {
    const auto victim = llama_kv_policy_parse(p.spec).desc->victim;

    return std::make_unique<llama_kv_ledger>((uint32_t) p.n_slots, (uint32_t) p.budget, (uint32_t) p.sinks,
            (uint32_t) std::max<int64_t>(1, p.recent), victim ? victim() : nullptr, /*compact =*/ true);
}

// victims: their ranks before any of them is gone
static void drop(llama_context * ctx, std::vector<uint32_t> victims) {
    auto * mem = llama_get_memory(ctx);

    std::sort(victims.begin(), victims.end(), std::greater<uint32_t>());

    for (size_t i = 0; i < victims.size(); ) {
        const llama_pos end = (llama_pos) victims[i] + 1;

        llama_pos begin = end;
        while (i < victims.size() && (llama_pos) victims[i] == begin - 1) {
            begin--;
            i++;
        }
        if (!llama_memory_seq_rm(mem, 0, begin, end)) {
            equip_fail(EQUIP_ERR_UNSUPPORTED, "this model's memory cannot drop tokens from its middle: use update=inplace");
        }
        llama_memory_seq_add(mem, 0, end, -1, begin - end);
    }
}

bool equip_shift_place(equip_session & s, int32_t n, std::vector<uint32_t> & ranks) {
    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    if (!s.shift->place(s.n_past, (uint32_t) n, ranks, victims, moves)) {
        return false;
    }
    drop(s.ctx, victims);

    return true;
}

void equip_shift_commit(equip_session & s) {
    std::vector<uint32_t>              victims;
    std::vector<llama_kv_ledger::move> moves;

    s.shift->commit(victims, moves);
    drop(s.ctx, victims);
}

void equip_shift_fail(equip_session & s) {
    std::vector<uint32_t> freed;

    s.shift->truncate(s.n_past, freed); // upstream has dropped the chunk
}

int equip_shift_rewind(equip_session & s, int32_t p0) {
    const bool to_start = p0 <= s.shift->pos_first();

    if (!to_start && !s.shift->can_rewind(p0)) {
        equip_fail(EQUIP_ERR_REWIND, "position %d cannot be gone back to: what is needed before it has been evicted; rewind to %d or later, or to 0",
                p0, s.shift->tail_first());
    }
    const int kind = to_start || s.shift->rewind_exact(p0) ? LLAMA_KV_REWIND_EXACT : LLAMA_KV_REWIND_SHORTENED;

    std::vector<uint32_t> freed;
    s.shift->truncate(p0, freed);

    if (!llama_memory_seq_rm(llama_get_memory(s.ctx), 0, (llama_pos) s.shift->n_used(), -1)) {
        equip_fail(EQUIP_ERR_REWIND, "this model's memory cannot go back to position %d: rewind to 0", p0);
    }
    return kind;
}

// what llama-server and llama-cli do when the cache is full: the older half of what is neither kept nor new goes at once
bool equip_shift_context(equip_session & s, int32_t n) {
    auto * mem = llama_get_memory(s.ctx);

    const int32_t n_keep = (int32_t) s.params.sinks;

    while (s.n_past - s.n_shifted + n > s.n_ctx) {
        const int32_t n_used    = s.n_past - s.n_shifted;
        const int32_t n_discard = (n_used - n_keep)/2;

        if (n_discard <= 0 || !llama_memory_seq_rm(mem, 0, n_keep, n_keep + n_discard)) {
            return false;
        }
        llama_memory_seq_add(mem, 0, n_keep + n_discard, -1, -n_discard);
        s.n_shifted += n_discard;
    }
    return true;
}

int32_t equip_shift_kept(const equip_session & s, int32_t * pos, int32_t * slot, int32_t n_max) {
    // upstream's positions are the ranks
    const int32_t n = llama_kv_policy_get_kept(s.ctx, 0, nullptr, slot, n_max);

    const auto ranks = s.shift->kept();
    for (int32_t i = 0; pos && i < std::min(n, n_max); ++i) {
        pos[i] = s.shift->pos_of(ranks[i]);
    }
    return n;
}
