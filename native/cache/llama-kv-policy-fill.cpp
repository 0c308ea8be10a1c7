#include "llama-kv-policy-impl.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-move.h"
#include "llama-model.h"

#include <algorithm>
#include <exception>

// benchmarks only: a long cache without reading a long text

bool llama_kv_policy::extend(llama_kv_cache & kv, llama_seq_id seq_id, uint32_t n, int n_threads) {
    const auto     strm = kv.seq_to_stream[seq_id];
    const uint32_t n0   = (uint32_t) (kv.seq_pos_max(seq_id) + 1);

    // the rows that are there are a compact beginning, and the new ones have room
    if (kv.policy || kv.other || n0 == 0 || kv.v_cells[strm].get_used() != n0 || kv.v_cells[strm].used_max_p1() != n0 || n0 + n > kv.get_size()) {
        return false;
    }

    llama_batch_allocr balloc(kv.hparams.n_pos_per_embd());

    llama_ubatch ubatch = balloc.ubatch_reserve(n, 1);

    ubatch.seq_id_unq[0] = seq_id;
    for (uint32_t i = 0; i < n; ++i) {
        for (uint32_t j = 0; j < kv.hparams.n_pos_per_embd(); ++j) {
            ubatch.pos[i + j*n] = (llama_pos) (n0 + i);
        }
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id  [i] = &seq_id;
    }

    const auto sinfo = kv.find_slot(ubatch, /*cont =*/ true);
    if (sinfo.empty() || sinfo.idxs[0].front() != n0) {
        return false;
    }
    kv.apply_ubatch(sinfo, ubatch);

    // what is there is doubled until it is long enough
    llama_kv_backends backends(n_threads);

    for (uint32_t have = n0; have < n0 + n; have *= 2) {
        std::vector<llama_kv_ledger::move> moves;
        for (uint32_t i = 0; i < std::min(have, n0 + n - have); ++i) {
            moves.push_back({ i, have + i });
        }
        if (!llama_kv_move(backends, layers_of(kv), strm, moves, kv.v_trans)) {
            kv.seq_rm(seq_id, (llama_pos) n0, -1);
            return false;
        }
    }

    return true;
}

bool llama_kv_policy_fill(llama_context * ctx, llama_seq_id seq_id, int32_t n) {
    auto * kv = ctx ? dynamic_cast<llama_kv_cache *>(ctx->get_memory()) : nullptr;

    if (!kv || n <= 0 || seq_id < 0 || (uint32_t) seq_id >= kv->get_n_seq_max()) {
        return false;
    }
    ctx->synchronize();

    try {
        return llama_kv_policy::extend(*kv, seq_id, (uint32_t) n, ctx->n_threads_batch());
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return false;
    }
}
