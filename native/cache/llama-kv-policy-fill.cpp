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

    const auto & cells = kv.v_cells[strm];

    // the sequence's own rows, by position: all of its tokens are there
    std::vector<uint32_t> rows(n0, UINT32_MAX);
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i) && cells.seq_has(i, seq_id)) {
            rows[cells.pos_get(i)] = i;
        }
    }
    if (kv.policy || kv.other || n0 == 0 || cells.get_used() + n > kv.get_size() || std::find(rows.begin(), rows.end(), UINT32_MAX) != rows.end()) {
        return false;
    }

    llama_batch_allocr balloc(kv.hparams.n_pos_per_embd());
    llama_kv_backends  backends(n_threads);

    // what is there is doubled until it is long enough
    while (rows.size() < n0 + n) {
        const uint32_t have = (uint32_t) rows.size();
        const uint32_t more = std::min(have, n0 + n - have);

        llama_ubatch ubatch = balloc.ubatch_reserve(more, 1);

        ubatch.seq_id_unq[0] = seq_id;
        for (uint32_t i = 0; i < more; ++i) {
            for (uint32_t j = 0; j < kv.hparams.n_pos_per_embd(); ++j) {
                ubatch.pos[i + j*more] = (llama_pos) (have + i);
            }
            ubatch.n_seq_id[i] = 1;
            ubatch.seq_id  [i] = &seq_id;
        }

        std::vector<llama_kv_ledger::move> moves;

        const auto sinfo = kv.find_slot(ubatch, /*cont =*/ false);
        if (!sinfo.empty()) {
            kv.apply_ubatch(sinfo, ubatch);
            for (uint32_t i = 0; i < more; ++i) {
                moves.push_back({ rows[i], sinfo.idxs[0][i] });
                rows.push_back(sinfo.idxs[0][i]);
            }
        }
        if (moves.empty() || !llama_kv_move(backends, layers_of(kv), strm, moves, kv.v_trans)) {
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
