#include "llama-kv-scores.h"

#include "llama-impl.h"

#include "ggml-cpu-attn.h"
#include "llama-kv-filter.h"
#include "llama-kv-score-node.h"

#include <algorithm>
#include <cmath>

// the nodes that sum up attention weights, keep norms, and write each head's token to a slot of its own

// most bytes that a tile of recomputed weights may take
static constexpr int64_t TILE_BYTES = 16*1024*1024;

// most heads of a group that are added one by one
static constexpr int64_t MAX_ADDS = 8;

// op_params of the custom operations that hold our own numbers, behind ggml's
enum { PARAM_FIRST = 12, PARAM_T0 = 13, PARAM_T = 14, PARAM_SUMS = 15 };

void llama_kv_scores::op_add(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & l = *(const layer_state *) data;
    const auto & s = *l.owner;

    if (s.filter && s.filter->is_skipped(l.i_layer)) {
        return;
    }

    const ggml_tensor * sm = dst->src[0]; // [n_kv, n, n_head, ns]; sums: [n_kv, 1, n_head_kv, ns]

    const int64_t n_kv   = sm->ne[0];
    const int64_t n      = sm->ne[1];
    const int64_t n_head = sm->ne[2];
    const int64_t n_hkv  = s.layers[l.i_layer].n_head_kv;
    const int64_t group  = n_head/n_hkv;

    const int64_t t0 = dst->op_params[PARAM_T0];
    const int64_t T  = dst->op_params[PARAM_T];

    // sequences that share a cache have their tokens one behind the other, and rows of their own
    const bool    is_pool = s.where.pool != nullptr;
    const int64_t T_seq   = T/s.n_sharing();

    // each thread has its rows, in whole cache lines
    const int64_t per = GGML_PAD((n_kv + nth - 1)/nth, 16);
    const int64_t j0  = std::min(n_kv, per*ith);
    const int64_t j1  = std::min(n_kv, j0 + per);

    const float decay_all = std::pow(s.needs.decay, (float) T_seq);

    for (size_t is = 0; is < s.step.size(); ++is) {
        const auto & st = s.step[is];

        const uint32_t strm = s.where.stream_of(st.seq);

        const auto for_rows = [&](auto && f) {
            if (is_pool) {
                s.where.pool->for_rows(st.seq, (uint32_t) j0, (uint32_t) j1, f);
            } else {
                f(j0, j1);
            }
        };
        const auto add = [&](float * acc, const float * row, float w) {
            for_rows([=](int64_t a, int64_t b) {
                if (w == 1.0f) {
                    for (int64_t j = a; j < b; ++j) {
                        acc[j] += row[j];
                    }
                } else {
                    for (int64_t j = a; j < b; ++j) {
                        acc[j] += w*row[j];
                    }
                }
            });
        };

        for (int64_t h = 0; h < n_hkv; ++h) {
            float * acc = (float *) ((char *) l.weights.t->data + h*l.weights.t->nb[1] + strm*l.weights.t->nb[2]);

            if (dst->op_params[PARAM_FIRST]) {
                if (s.needs.decay != 1.0f) {
                    for_rows([=](int64_t a, int64_t b) {
                        for (int64_t j = a; j < b; ++j) {
                            acc[j] *= decay_all;
                        }
                    });
                }

                const auto zero = [&](int64_t row) {
                    if (row >= j0 && row < j1) {
                        acc[row] = 0.0f;
                    }
                };
                for (const uint32_t row : st.rows) {
                    zero(row);
                }
                if (!st.unit_rows.empty()) {
                    zero(st.unit_rows[s.unit_of(l.i_layer, (uint32_t) h)]);
                }
            }

            if (dst->op_params[PARAM_SUMS]) {
                add(acc, (const float *) ((const char *) sm->data + h*sm->nb[2] + (is_pool ? 0 : is)*sm->nb[3]), 1.0f);
                continue;
            }

            for (int64_t g = 0; g < group; ++g) {
                // of this sequence's tokens those that the tile has
                const int64_t q0 = is_pool ? (int64_t) is*T_seq : 0;

                for (int64_t t = std::max<int64_t>(0, q0 + s.first_query(T_seq) - t0); t < std::min(n, q0 + T_seq - t0); ++t) {
                    const float * row = (const float *) ((const char *) sm->data + t*sm->nb[1] + (h*group + g)*sm->nb[2] + (is_pool ? 0 : is)*sm->nb[3]);

                    const float w = s.needs.decay == 1.0f ? 1.0f : std::pow(s.needs.decay, (float) (q0 + T_seq - 1 - t0 - t));
                    if (w > 0.0f) {
                        add(acc, row, w);
                    }
                }
            }
        }
    }
}

uint32_t llama_kv_scores::first_query(int64_t n_tokens) const {
    const int64_t n = needs.window > 0 && n_tokens >= needs.window ? std::min(p.n_queries, needs.window) : p.n_queries;

    return (uint32_t) std::max<int64_t>(0, n_tokens - n);
}

int64_t llama_kv_scores::tile_size(int64_t n_kv, int64_t n_head) const {
    return std::max<int64_t>(8, TILE_BYTES/(n_kv*n_head*(int64_t) sizeof(float)));
}

uint32_t llama_kv_scores::n_nodes(uint32_t n_tokens) const {
    uint32_t res = 16;

    for (const auto & [buft, d] : devices) {
        res += on_device ? (uint32_t) n_nodes_choice(d) : 0;
    }

    for (size_t i = 0; i < layers.size(); ++i) {
        const int64_t n_queries = n_tokens - first_query(n_tokens);
        const int64_t n_tiles   = needs.weights ? n_queries/tile_size(n_rows, layers[i].n_head) + 1 : 0;

        // a tile: softmax with soft cap, sum; the rest: zeroing, norms and queries, per stream; a write per head
        res += (uint32_t) (20*n_tiles + n_seq*32 + 24);
    }

    return res;
}

ggml_tensor * llama_kv_scores::idx_of(ggml_context * ctx, const device & d, uint32_t i_head, uint32_t n_head, uint32_t lane) const {
    return ggml_view_2d(ctx, d.idx_head, 1, n_head, sizeof(int64_t), ((size_t) lane*d.n_head + i_head)*sizeof(int64_t));
}

// of the one token: [1, n_head_kv], or [1, 1] where all heads have the same
ggml_tensor * llama_kv_scores::row_of(ggml_context * ctx, size_t i_layer, uint32_t lane) const {
    const auto & l = *states[i_layer];
    const auto & d = devices.at(l.buft);

    if (ggml_tensor * rows = filter ? filter->get_rows(i_layer) : nullptr) {
        return rows;
    }
    if (!on_device) {
        return idx_of(ctx, d, l.i_head, layers[i_layer].n_head_kv, lane);
    }
    return ggml_view_2d(ctx, d.victims, 1, p.scope == LLAMA_KV_SCOPE_HEAD ? layers[i_layer].n_head_kv : 1, sizeof(int32_t),
            lane*d.victims->nb[1] + l.i_unit*sizeof(int32_t));
}

ggml_tensor * llama_kv_scores::write(ggml_context * ctx, ggml_tensor * dst, ggml_tensor * rows, const layer_state & l, uint32_t i_layer, uint32_t lane,
        uint32_t i_tok, int64_t n) const {
    const auto & d = devices.at(l.buft);

    // [n] of all heads, or one per head
    ggml_tensor * idx = n == 1 ? row_of(ctx, i_layer, lane) : ggml_view_1d(ctx, d.idx_chunk, n, i_tok*sizeof(int64_t));

    return ggml_set_rows(ctx, dst, rows, idx);
}

ggml_tensor * llama_kv_scores::build_rows(ggml_context * ctx, ggml_tensor * cur, size_t i_layer, uint32_t s0, bool is_v) const {
    const auto & l = *states[i_layer];

    const int64_t n_embd = cur->ne[0];
    const int64_t n_head = cur->ne[1];

    ggml_tensor * res = nullptr;

    for (int64_t i = 0; i < cur->ne[2]; ++i) {
        const uint32_t strm = where.pool ? 0 : s0 + (uint32_t) i;

        ggml_tensor * t = is_v ? layers[i_layer].v_stream[strm] : layers[i_layer].k_stream[strm];

        ggml_tensor * node;

        const bool is_flat = p.scope != LLAMA_KV_SCOPE_HEAD && cur->nb[1] == ggml_row_size(cur->type, n_embd);

        if (is_flat && !(is_v && p.v_trans)) {
            // one row for all heads, written as upstream does it: behind a rotation that is one operation on some devices
            ggml_tensor * src = ggml_view_2d(ctx, cur, n_embd*n_head, 1, cur->nb[2], i*cur->nb[2]);

            ggml_tensor * row = filter && filter->get_rows(i_layer) ? nullptr : l.row;

            node = row ? ggml_set_rows(ctx, is_v ? layers[i_layer].v : layers[i_layer].k, src, row) :
                ggml_set_rows(ctx, t, src, ggml_view_1d(ctx, row_of(ctx, i_layer, lane(s0, (uint32_t) i)), 1, 0));
        } else if (is_v && p.v_trans && (on_device || (filter && filter->get_rows(i_layer)))) {
            const size_t nb = ggml_row_size(t->type, n_rows);

            ggml_tensor * src = ggml_view_4d(ctx, cur, 1, 1, n_embd, n_head, cur->nb[0], cur->nb[0], cur->nb[1], i*cur->nb[2]);
            ggml_tensor * dst = ggml_view_4d(ctx, t,   1, n_rows, n_embd, n_head, ggml_type_size(t->type), nb, n_embd*nb, 0);
            ggml_tensor * idx = row_of(ctx, i_layer, lane(s0, (uint32_t) i));

            node = ggml_set_rows(ctx, dst, src, ggml_reshape_3d(ctx, idx, 1, 1, idx->ne[1]));
        } else if (is_v && p.v_trans) {
            ggml_tensor * src = ggml_view_3d(ctx, cur, n_embd, n_head, 1, cur->nb[1], cur->nb[2], i*cur->nb[2]);
            src = ggml_is_contiguous(src) ? src : ggml_cont(ctx, src);

            ggml_tensor * idx = ggml_view_1d(ctx, devices.at(l.buft).idx_v, n_embd*n_head,
                    ((size_t) l.i_embd_v*n_seq + lane(s0, (uint32_t) i)*n_embd*n_head)*sizeof(int64_t));

            node = ggml_set_rows(ctx, ggml_reshape_2d(ctx, t, 1, ggml_nelements(t)), ggml_reshape_2d(ctx, src, 1, n_embd*n_head), idx);
        } else {
            ggml_tensor * src = ggml_view_3d(ctx, cur, n_embd, 1,       n_head, cur->nb[1], cur->nb[1], i*cur->nb[2]);
            ggml_tensor * dst = ggml_view_3d(ctx, t,   n_embd, n_rows,  n_head, t->nb[1], ggml_row_size(t->type, n_embd), 0);

            node = write(ctx, dst, src, l, (uint32_t) i_layer, lane(s0, (uint32_t) i), 0, 1);
        }

        // a chain, since the caller expands the last one only
        if (res) {
            node->src[GGML_MAX_SRC - 1] = res;
        }
        res = node;
    }

    return res;
}

// a view between a key's rotation and its write would keep devices from doing both at once: it comes before
void llama_kv_scores::build_row(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer, int64_t n_tokens) const {
    const auto & l = *states[i_layer];
    const auto & d = devices.at(l.buft);

    l.row = nullptr;

    // (an index in i32, of victims that are chosen by ggml's operations, stands in the way too)
    const bool is_wide = !on_device || d.rows;

    if (n_tokens == 1 && n_stream == 1 && !where.pool && p.scope != LLAMA_KV_SCOPE_HEAD && !d.is_cpu && is_wide) {
        l.row = ggml_view_1d(ctx, on_device ? d.rows : d.idx_head, 1, (on_device ? l.i_unit : l.i_head)*sizeof(int64_t));
        ggml_build_forward_expand(gf, l.row);
    }
}

void llama_kv_scores::build_norms(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer) const {
    const auto & l = *states[i_layer];
    const auto & d = devices.at(l.buft);

    const auto     from = l.written;
    const uint32_t s0   = from.s0;

    l.written = {};

    const auto store = [&](const plane & pl, ggml_tensor * cur, bool is_l1) {
        if (!ggml_is_contiguous(cur)) {
            cur = ggml_cont(ctx, cur);
        }
        if (is_l1 && d.had_v) {
            cur = llama_mul_mat_hadamard(ctx, cur, d.had_v); // its own inverse
        }

        cur = ggml_sum_rows(ctx, is_l1 ? ggml_abs(ctx, cur) : ggml_sqr(ctx, cur)); // [1, n_head_kv, n_tokens]
        if (!is_l1) {
            cur = ggml_sqrt(ctx, cur);
        }

        // one token of each sequence has a row per head; more of them have the same in all heads
        const uint32_t n_part = where.pool ? (cur->ne[2] == n_sharing() ? n_sharing() : 1) : from.ns;

        const int64_t n_hkv = cur->ne[1];
        const int64_t n     = cur->ne[2]/n_part;

        for (uint32_t i = 0; i < n_part; ++i) {
            ggml_tensor * src = ggml_view_3d(ctx, cur, 1, n, n_hkv, cur->nb[2], cur->nb[1], i*n*cur->nb[2]);
            ggml_tensor * dst = ggml_view_3d(ctx, pl.t, 1, n_rows, n_hkv, pl.t->nb[0], pl.t->nb[1], (where.pool ? 0 : s0 + i)*pl.t->nb[2]);

            ggml_build_forward_expand(gf, write(ctx, dst, src, l, (uint32_t) i_layer, lane(s0, i), (uint32_t) (i*n), n));
        }
    };

    if (from.k_cur && l.k_norm.t) {
        store(l.k_norm, from.k_cur, false);
    }
    if (from.v_cur && l.v_norm.t) {
        store(l.v_norm, from.v_cur, needs.v_l1);
    }
}

static ggml_tensor * product(ggml_context * ctx, ggml_tensor * k, ggml_tensor * q) {
    ggml_tensor * res = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(res, GGML_PREC_F32);

    return res;
}

// kq: the products [n_kv, n, n_head, ...]
static ggml_tensor * normalise(ggml_context * ctx, const llama_kv_scores::attention & a, ggml_tensor * kq, ggml_tensor * mask) {
    if (a.soft_cap > 0.0f) {
        kq = ggml_scale(ctx, kq, a.scale/a.soft_cap);
        kq = ggml_tanh (ctx, kq);
        kq = ggml_scale(ctx, kq, a.soft_cap);
    }

    kq = ggml_soft_max_ext(ctx, kq, mask, a.soft_cap > 0.0f ? 1.0f : a.scale, a.max_bias);
    ggml_soft_max_add_sinks(kq, a.sinks);

    return kq;
}

ggml_tensor * llama_kv_scores::softmax(ggml_context * ctx, const attention & a, int64_t t0, int64_t n) const {
    if (a.kq) {
        return n == a.kq->ne[1] ? a.kq :
            ggml_cont(ctx, ggml_view_4d(ctx, a.kq, a.kq->ne[0], n, a.kq->ne[2], a.kq->ne[3], a.kq->nb[1], a.kq->nb[2], a.kq->nb[3], t0*a.kq->nb[1]));
    }

    ggml_tensor * q    = a.q;
    ggml_tensor * mask = a.mask;

    if (n != q->ne[1]) {
        q    = ggml_view_4d(ctx, q, q->ne[0], n, q->ne[2], q->ne[3], q->nb[1], q->nb[2], q->nb[3], t0*q->nb[1]);
        mask = ggml_view_4d(ctx, mask, mask->ne[0], n, mask->ne[2], mask->ne[3], mask->nb[1], mask->nb[2], mask->nb[3], t0*mask->nb[1]);
        if (!ggml_is_contiguous(mask)) {
            mask = ggml_cont(ctx, mask);
        }
    }

    return normalise(ctx, a, product(ctx, a.k, q), mask);
}

void llama_kv_scores::keep_queries(ggml_context * ctx, ggml_cgraph * gf, const attention & a, size_t i_layer, uint32_t s0) const {
    const auto & l = *states[i_layer];
    const auto & d = devices.at(l.buft);

    l.attn = a;

    const int64_t T = a.q->ne[1]/n_sharing();
    const int64_t n = std::min<int64_t>(T, needs.window);

    for (uint32_t i = 0; i < a.q->ne[3]*n_sharing(); ++i) {
        ggml_tensor * q = ggml_view_3d(ctx, a.q, a.q->ne[0], n, a.q->ne[2], a.q->nb[1], a.q->nb[2],
                (T - n)*a.q->nb[1] + (where.pool ? i*T*a.q->nb[1] : i*a.q->nb[3]));

        q = ggml_cont_2d(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), a.q->ne[0]*a.q->ne[2], n);

        // in a pool the index tells whose they are: the graph may be used again for other sequences
        ggml_tensor * dst = where.pool ? ggml_view_2d(ctx, l.queries, l.queries->ne[0], needs.window*n_seq, l.queries->nb[1], 0) :
            ggml_view_2d(ctx, l.queries, l.queries->ne[0], needs.window, l.queries->nb[1], (s0 + i)*l.queries->nb[2]);
        ggml_tensor * idx = ggml_view_1d(ctx, d.idx_query, n, lane(s0, i)*d.idx_query->nb[1]);

        ggml_build_forward_expand(gf, ggml_set_rows(ctx, dst, q, idx));
    }
}

void llama_kv_scores::add_sums(ggml_context * ctx, ggml_cgraph * gf, const attention & a, size_t i_layer) const {
    const auto & l = *states[i_layer];

    const int64_t n_kv  = a.k->ne[1];
    const int64_t n_hkv = a.k->ne[2];
    const int64_t ns    = a.k->ne[3];
    const int64_t T     = a.q->ne[1];

    ggml_tensor * sums = devices.at(l.buft).sums;

    // one tensor for all layers: each is added up before the next one is computed
    ggml_cpu_attn_set_scores(a.flash, ggml_view_3d(ctx, sums, n_kv, n_hkv, ns, sums->nb[1], sums->nb[2], 0), (int32_t) first_query(T/n_sharing()), needs.decay,
            (int32_t) (T/n_sharing()));

    // what is written is a source of the attention, so a reader has the attention itself for a source
    ggml_tensor * args[2] = { ggml_view_4d(ctx, sums, n_kv, 1, n_hkv, ns, sums->nb[1], sums->nb[1], sums->nb[2], 0), a.flash };

    ggml_tensor * cur = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 2, op_add, GGML_N_TASKS_MAX, const_cast<layer_state *>(&l));

    cur->op_params[PARAM_FIRST] = a.is_first;
    cur->op_params[PARAM_T]     = (int32_t) T;
    cur->op_params[PARAM_SUMS]  = 1;

    ggml_build_forward_expand(gf, cur);
}

// a + b, written to dst
static ggml_tensor * add_into(ggml_context * ctx, ggml_tensor * dst, ggml_tensor * a, ggml_tensor * b) {
    ggml_tensor * res = ggml_view_tensor(ctx, dst);

    res->op     = GGML_OP_ADD;
    res->src[0] = a;
    res->src[1] = b;

    return res;
}

// of all layers of a device, before the first of them adds: a decay, and zeros for the one token of each sequence
void llama_kv_scores::begin_sums(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer, uint32_t s0, int64_t ns, int64_t n_each) const {
    const auto & d = devices.at(states[i_layer]->buft);

    // those that may leave a token out begin when that is known
    const int64_t n_head = n_each == 1 ? n_head_unfiltered(d) : d.n_head;
    if (n_head == 0) {
        return;
    }

    const size_t nb2 = ns == 1 ? n_head*d.planes->nb[1] : d.planes->nb[2];

    ggml_tensor * all = ggml_view_3d(ctx, d.planes, n_rows, n_head, ns, d.planes->nb[1], nb2, s0*d.planes->nb[2]);

    if (needs.weights && needs.decay != 1.0f && where.pool) {
        ggml_build_forward_expand(gf, ggml_mul_inplace(ctx, all, d.shrinks));
    } else if (needs.weights && needs.decay != 1.0f) {
        ggml_build_forward_expand(gf, ggml_scale_inplace(ctx, all, std::pow(needs.decay, (float) n_each)));
    }

    if (on_device && n_each == 1) {
        begin_choice(ctx, gf, d, s0, ns);
        return;
    }

    for (int64_t i = 0; n_each == 1 && i < ns*n_sharing(); ++i) {
        ggml_tensor * dst  = ggml_view_3d(ctx, d.planes, 1, n_rows, n_head, d.planes->nb[0], d.planes->nb[1], (where.pool ? 0 : s0 + i)*d.planes->nb[2]);
        ggml_tensor * zero = ggml_view_3d(ctx, d.zeros, 1, 1, n_head, sizeof(float), sizeof(float), 0);

        ggml_build_forward_expand(gf, ggml_set_rows(ctx, dst, zero, idx_of(ctx, d, 0, (uint32_t) n_head, lane(s0, (uint32_t) i))));
    }
}

void llama_kv_scores::add_tile(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * sm, size_t i_layer, uint32_t s0, int64_t t0, int64_t n_tokens, bool first) const {
    const auto & l = *states[i_layer];
    const auto & d = devices.at(l.buft);

    if (d.is_cpu) {
        ggml_tensor * cur = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &sm, 1, op_add, GGML_N_TASKS_MAX, const_cast<layer_state *>(&l));

        cur->op_params[PARAM_FIRST] = first;
        cur->op_params[PARAM_T0]    = (int32_t) t0;
        cur->op_params[PARAM_T]     = (int32_t) n_tokens;

        ggml_build_forward_expand(gf, cur);
        return;
    }

    ggml_tensor * acc = l.weights.t;

    const int64_t n_kv  = sm->ne[0];
    const int64_t n     = sm->ne[1];
    const int64_t n_hkv = acc->ne[1];
    const int64_t group = sm->ne[2]/n_hkv;
    const int64_t ns    = sm->ne[3];

    // sequences, and tokens of each: those of a pool share the rows of a stream
    const int64_t n_part = ns*n_sharing();
    const int64_t n_each = n_tokens/n_sharing();

    if (first && n_each > 1) {
        for (int64_t i = 0; i < n_part; ++i) {
            ggml_tensor * dst  = ggml_view_3d(ctx, acc, 1, n_rows, n_hkv, acc->nb[0], acc->nb[1], (where.pool ? 0 : s0 + i)*acc->nb[2]);
            ggml_tensor * zero = ggml_view_3d(ctx, d.zeros, 1, n_each, n_hkv, sizeof(float), n_each*sizeof(float), 0);

            ggml_build_forward_expand(gf, write(ctx, dst, zero, l, (uint32_t) i_layer, lane(s0, (uint32_t) i), (uint32_t) (i*n_each), n_each));
        }
    }

    if (where.pool && weighs_queries(n_each)) {
        sm = ggml_mul(ctx, sm, ggml_view_2d(ctx, d.counts, 1, n, sizeof(float), t0*sizeof(float)));
    } else if (needs.decay != 1.0f && n_tokens > 1) {
        sm = ggml_mul(ctx, sm, ggml_view_2d(ctx, d.powers, 1, n, sizeof(float), (p.n_ubatch - n_tokens + t0)*sizeof(float)));
    }

    acc = ggml_view_3d(ctx, acc, n_kv, n_hkv, ns, acc->nb[1], acc->nb[2], s0*acc->nb[2]);

    if (n == 1 && group <= MAX_ADDS) {
        std::vector<ggml_tensor *> heads_of;
        for (int64_t g = 0; g < group; ++g) {
            heads_of.push_back(ggml_view_3d(ctx, sm, n_kv, n_hkv, ns, group*sm->nb[2], sm->nb[3], g*sm->nb[2]));
        }
        add_heads(ctx, gf, acc, heads_of);
        return;
    }

    // over the queries and over the heads of the group
    ggml_tensor * cur = ggml_reshape_4d(ctx, sm, n_kv, n*group, n_hkv, ns);
    if (n*group > 1) {
        cur = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, cur, 1, 0, 2, 3)));
    }
    cur = ggml_reshape_3d(ctx, cur, n_kv, n_hkv, ns);

    ggml_build_forward_expand(gf, ggml_add_inplace(ctx, acc, cur));
}

// a single token: the heads of a group are added one after the other, which devices do at once; all have the shape of acc
void llama_kv_scores::add_heads(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * acc, const std::vector<ggml_tensor *> & heads_of) const {
    for (ggml_tensor * t : heads_of) {
        ggml_build_forward_expand(gf, t); // else views stand between the additions
    }
    ggml_tensor * sum = acc;
    for (size_t g = 0; g + 1 < heads_of.size(); ++g) {
        sum = ggml_add(ctx, sum, heads_of[g]);
    }
    ggml_build_forward_expand(gf, heads_of.size() == 1 ? ggml_add_inplace(ctx, acc, heads_of[0]) : add_into(ctx, acc, sum, heads_of.back()));
}

//
// one token beside flash attention, on a device: its weights in all layers at once, when the last of them has been computed
//

void llama_kv_scores::init_stack(device & d, ggml_backend_buffer_type_t buft, ggml_context * ctx) const {
    const auto & first = layers[d.i_first];

    std::vector<size_t> idx;
    for (size_t i = d.i_first; i < layers.size(); ++i) {
        if (states[i]->buft == buft) {
            idx.push_back(i);
            if (layers[i].n_head != first.n_head || layers[i].n_head_kv != first.n_head_kv || first.n_head/first.n_head_kv > MAX_ADDS) {
                return;
            }
        }
    }
    for (size_t i : idx) {
        d.k_stack.push_back(layers[i].k);
    }

    const int64_t n_embd_head = first.k->ne[0]/first.n_head_kv;

    if (d.has_node) {
        ggml_context_ptr shapes { ggml_init({ 8*ggml_tensor_overhead(), nullptr, true }) };

        ggml_tensor * q    = ggml_new_tensor_4d(shapes.get(), GGML_TYPE_F32, n_embd_head, 1, first.n_head, n_stream);
        ggml_tensor * mask = ggml_new_tensor_4d(shapes.get(), GGML_TYPE_F16, n_rows, 1, 1, n_stream);
        ggml_tensor * sums = ggml_view_3d(shapes.get(), d.planes, n_rows, first.n_head_kv, n_stream, d.planes->nb[1], d.planes->nb[2], 0);

        d.has_weights_node = llama_kv_score_covers(buft, llama_kv_score_weights_node(shapes.get(), { { q }, {}, d.k_stack.data(), mask, sums, 1.0f, 0.0f, 0 }));
        if (d.has_weights_node) {
            return;
        }
    }

    d.keys = llama_kv_keys_of(layers, idx);
    if (d.keys.t) {
        d.queries = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n_embd_head, first.n_head, d.n_layer, n_stream);
    }
}

// attention is the same in all layers that wait, but for queries, keys and sinks
bool llama_kv_scores::can_wait(const attention & a, size_t i_layer) const {
    const auto & d = devices.at(states[i_layer]->buft);

    const auto is_same = [&](const attention & b) {
        return a.mask == b.mask && a.scale == b.scale && a.soft_cap == b.soft_cap && a.k->ne[1] == b.k->ne[1] && (a.sinks == nullptr) == (b.sinks == nullptr) &&
            (!d.has_weights_node || ggml_are_same_stride(a.q, b.q));
    };
    const bool is_kept = d.has_weights_node ? a.q->nb[0] == sizeof(float) : d.queries && !a.sinks;

    return is_kept && !a.kq && a.q->ne[1] == 1 && a.is_first && a.max_bias == 0.0f && a.q->ne[0]*layers[i_layer].n_head_kv == layers[i_layer].k->ne[0] &&
        (d.waiting.empty() || is_same(d.waiting[0].second));
}

void llama_kv_scores::wait(ggml_context * ctx, ggml_cgraph * gf, const attention & a, size_t i_layer, uint32_t s0) const {
    const auto & l = *states[i_layer];
    const auto & d = devices.at(l.buft);

    d.waiting.push_back({ i_layer, a });

    if (d.has_weights_node) {
        return; // the node has them for sources
    }
    const ggml_tensor * all = d.queries;

    ggml_tensor * src = ggml_view_3d(ctx, a.q, a.q->ne[0], a.q->ne[2], a.q->ne[3], a.q->nb[2], a.q->nb[3], 0);
    ggml_tensor * dst = ggml_view_3d(ctx, d.queries, all->ne[0], all->ne[1], a.q->ne[3], all->nb[1], all->nb[3], l.i_stack*all->nb[2] + s0*all->nb[3]);

    ggml_build_forward_expand(gf, ggml_cpy(ctx, src, dst));
}

// of n layers that wait, from the i-th on: neighbours
ggml_tensor * llama_kv_scores::weights_node(ggml_context * ctx, const device & d, size_t i, size_t n, uint32_t s0) const {
    const auto & a = d.waiting[i].second;
    const auto & l = *states[d.waiting[i].first];

    llama_kv_score_weights what = {};
    for (size_t j = i; j < i + n; ++j) {
        what.q.push_back(d.waiting[j].second.q);
        if (a.sinks) {
            what.sinks.push_back(d.waiting[j].second.sinks);
        }
    }
    what.keys     = d.k_stack.data() + l.i_stack;
    what.mask     = a.mask;
    what.sums     = ggml_view_3d(ctx, d.planes, a.k->ne[1], a.k->ne[2]*(int64_t) n, a.k->ne[3], d.planes->nb[1], d.planes->nb[2],
            l.weights.t->view_offs + s0*d.planes->nb[2]);
    what.scale    = a.scale;
    what.soft_cap = a.soft_cap;
    what.stream   = (int32_t) s0;

    return llama_kv_score_weights_node(ctx, what);
}

void llama_kv_scores::add_all(ggml_context * ctx, ggml_cgraph * gf, const device & d, uint32_t s0) const {
    if (d.waiting.empty()) {
        return;
    }
    const auto & a = d.waiting[0].second;

    const ggml_tensor * q = d.queries;
    const ggml_tensor * k = d.keys.t;

    const int64_t n_kv   = a.k->ne[1];
    const int64_t n_head = a.q->ne[2];
    const int64_t n_hkv  = a.k->ne[2];
    const int64_t group  = n_head/n_hkv;
    const int64_t n_most = d.has_weights_node ? (a.sinks ? GGML_KV_SCORE_LAYERS_SINK : GGML_KV_SCORE_LAYERS) :
        std::max<int64_t>(1, TILE_BYTES/(n_kv*n_head*(int64_t) sizeof(float))); // layers at once

    for (size_t i0 = 0, i1; i0 < d.waiting.size(); i0 = i1) {
        // neighbours
        const uint32_t l0 = states[d.waiting[i0].first]->i_stack;
        for (i1 = i0 + 1; i1 < d.waiting.size() && (int64_t) (i1 - i0) < n_most && states[d.waiting[i1].first]->i_stack == l0 + (i1 - i0); ++i1) {
        }
        const int64_t n_layer = (int64_t) (i1 - i0);

        if (d.has_weights_node) {
            ggml_build_forward_expand(gf, weights_node(ctx, d, i0, i1 - i0, s0));
            continue;
        }

        for (int64_t i = 0; i < a.k->ne[3]; ++i) {
            const int64_t strm = s0 + i;

            ggml_tensor * keys = ggml_view_4d(ctx, d.keys.t, q->ne[0], n_kv, n_hkv, n_layer, k->nb[1], ggml_row_size(k->type, q->ne[0]), k->nb[3],
                    strm*k->nb[2] + l0*k->nb[3]);
            ggml_tensor * queries = ggml_view_4d(ctx, d.queries, q->ne[0], group, n_hkv, n_layer, q->nb[1], group*q->nb[1], q->nb[2], strm*q->nb[3] + l0*q->nb[2]);
            ggml_tensor * mask = a.k->ne[3] == 1 ? a.mask : ggml_view_3d(ctx, a.mask, a.mask->ne[0], a.mask->ne[1], a.mask->ne[2], a.mask->nb[1], a.mask->nb[2], i*a.mask->nb[3]);

            ggml_tensor * sm = normalise(ctx, a, ggml_reshape_4d(ctx, product(ctx, keys, queries), n_kv, 1, n_head, n_layer), mask);

            const auto & w = states[d.waiting[i0].first]->weights;

            std::vector<ggml_tensor *> heads_of;
            for (int64_t g = 0; g < group; ++g) {
                heads_of.push_back(ggml_view_3d(ctx, sm, n_kv, n_hkv, n_layer, group*sm->nb[2], sm->nb[3], g*sm->nb[2]));
            }
            add_heads(ctx, gf, ggml_view_3d(ctx, d.planes, n_kv, n_hkv, n_layer, d.planes->nb[1], n_hkv*d.planes->nb[1], w.t->view_offs + strm*d.planes->nb[2]), heads_of);
        }
    }
    d.waiting.clear();
}

void llama_kv_scores::build(ggml_context * ctx, ggml_cgraph * gf, const attention & a, size_t i_layer, uint32_t s0) const {
    const auto & d = devices.at(states[i_layer]->buft);

    const int64_t T = a.q->ne[1];

    // (layers that attend to the keys of another one have queries of their own, which are not kept)
    if (needs.window > 0 && a.is_first) {
        keep_queries(ctx, gf, a, i_layer, s0);
    }

    if (!d.is_cpu && (needs.weights || on_device) && a.is_first && i_layer == d.i_first) {
        begin_sums(ctx, gf, i_layer, s0, a.k->ne[3], T/n_sharing());
        d.waiting.clear();
    }
    build_norms(ctx, gf, i_layer); // over what a device begins its token with

    // a single token in a layer that may leave it out
    ggml_tensor * gate = filter ? filter->get_gate(i_layer) : nullptr;
    if (gate && needs.weights) {
        begin_filtered(ctx, gf, i_layer, gate);
    }

    if (needs.weights) {
        if (d.is_cpu && a.kq) {
            add_tile(ctx, gf, a.kq, i_layer, s0, 0, T, a.is_first);
        } else if (d.is_cpu && a.flash) {
            add_sums(ctx, gf, a, i_layer);
        } else if (!gate && can_wait(a, i_layer)) {
            wait(ctx, gf, a, i_layer, s0);
        } else {
            const int64_t t_first = n_sharing() > 1 ? 0 : first_query(T);
            const int64_t tile    = tile_size(a.k->ne[1], a.q->ne[2]*a.q->ne[3]);

            for (int64_t t0 = t_first; t0 < T; t0 += tile) {
                const int64_t n = std::min(tile, T - t0);

                // (the softmax of the attention itself is multiplied already)
                ggml_tensor * sm = softmax(ctx, a, t0, n);
                sm = gate && !a.kq ? ggml_mul(ctx, sm, gate) : sm;

                add_tile(ctx, gf, sm, i_layer, s0, t0, T, a.is_first && t0 == t_first);
            }
        }
    }

    if (i_layer + 1 < layers.size()) {
        build_row(ctx, gf, i_layer + 1, T);
    }

    if (a.is_last_here) {
        add_all(ctx, gf, d, s0);
    }

    if (a.is_last_here && on_device && T == 1) {
        build_choice(ctx, gf, d, s0, a.k->ne[3]);
    }

    if (a.is_last && all_cpu && T == n_sharing()) {
        ggml_tensor * src = a.q;

        ggml_build_forward_expand(gf, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &src, 1, op_choose, GGML_N_TASKS_MAX,
                    const_cast<llama_kv_scores *>(this)));
    }
}
