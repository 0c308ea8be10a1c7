#include "llama-kv-filter.h"

#include "llama-kv-policy-impl.h"
#include "llama-kv-scores.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

// Token Filtering on a device, by ggml's own operations: the same formulas as in llama-kv-filter.cpp, in f32
//
// - anchors, thresholds and gates lie beside the keys of their layer. Each has two rows: a step reads what the last one has left, and writes the
//   other row; which is which is data, and changes when the step was computed
// - a layer that leaves a token out computes its attention all the same, and multiplies it by 0; its key and value, norms and zeros
//   go to the row that is never read
// - the host reads the gates of a step back, before it chooses the next victims

// variances that are rounding
static constexpr float EPS_VARIANCE = 1e-12f;

void llama_kv_filter::put(ggml_tensor * t, const void * data, size_t offs, size_t size) {
    ggml_backend_tensor_set(t, data, offs, size);
    traffic.n_writes++;
}

void llama_kv_filter::init_devices() {
    for (auto & lane : lanes) {
        if (lane.buft) {
            auto & d = devices[lane.buft];
            lane.i_lane = d.n_lane++;
            lane.i_head = d.n_head;
            d.n_head   += lane.n_head;
        }
    }

    // rows are computed in f32
    if (!devices.empty() && scores.row_never_read() >= 1u << 24) {
        llama_kv_policy_refuse("filter on a device is for a cache of less than 16777216 tokens: give a smaller budget, or leave filter out");
    }

    const uint32_t n_tokens = scores.get_params().n_ubatch + 1;

    for (auto & [buft, d] : devices) {
        d.ctx.reset(ggml_init({ (3*d.n_lane + 4)*ggml_tensor_overhead(), nullptr, true }));

        ggml_context * ctx = d.ctx.get();

        for (auto & lane : lanes) {
            if (lane.buft == buft) {
                lane.k       = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, layers[lane.i_layer].k->ne[0], 2);
                lane.v       = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, layers[lane.i_layer].v->ne[0], 2);
                lane.control = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 3, 2);
            }
        }
        d.now_host.resize(NOW_ROWS + d.n_head);
        d.now    = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, (int64_t) d.now_host.size());
        d.gates  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, d.n_lane);
        d.powers = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_tokens);

        d.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft));
        if (!d.buf) {
            throw std::runtime_error("failed to allocate buffer for the filter");
        }
        ggml_backend_buffer_clear(d.buf.get(), 0);

        d.idx = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 2);
        ggml_backend_tensor_alloc(d.buf.get(), d.idx, d.now->data);

        std::vector<float> powers(n_tokens);
        for (uint32_t i = 0; i < n_tokens; ++i) {
            powers[i] = (1.0f - llama_kv_filter_anchor::MEMORY)*std::pow(llama_kv_filter_anchor::MEMORY, (float) (n_tokens - 1 - i));
        }
        ggml_backend_tensor_set(d.powers, powers.data(), 0, powers.size()*sizeof(float));

        check(buft);
    }
}

// a device must compute all of it by itself: what is written lies there
void llama_kv_filter::check(ggml_backend_buffer_type_t buft) const {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);

    const auto & l = *std::find_if(lanes.begin(), lanes.end(), [&](const auto & lane) { return lane.buft == buft; });

    for (const int64_t n : { 1, 2 }) {
        llama_kv_graph graph(2*N_NODES);

        ggml_context * ctx = graph.get_ctx();

        ggml_tensor * k_cur = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, l.k->ne[0]/l.n_head, l.n_head, n);
        ggml_tensor * v_cur = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, l.v->ne[0]/l.n_head, l.n_head, n);

        auto copy = l;
        build_there(ctx, graph.get(), k_cur, v_cur, copy);

        for (int i = 0; dev && i < ggml_graph_n_nodes(graph.get()); ++i) {
            const ggml_tensor * node = ggml_graph_node(graph.get(), i);
            if (!ggml_backend_dev_supports_op(dev, node)) {
                llama_kv_policy_refuse(std::string(ggml_backend_dev_name(dev)) + " has no " + ggml_op_desc(node) +
                        " as filter needs it: leave filter out, or keep the cache in host memory");
            }
        }
    }
}

//
// the host
//

void llama_kv_filter::set_devices() {
    for (auto & lane : lanes) {
        if (lane.buft && is_stale) {
            const auto c = lane.anchor.get_control();

            put(lane.k,       lane.anchor.get_k().data(), i_row*lane.k->nb[1],       lane.k->nb[1]);
            put(lane.v,       lane.anchor.get_v().data(), i_row*lane.v->nb[1],       lane.v->nb[1]);
            put(lane.control, &c,                         i_row*lane.control->nb[1], sizeof(c));
        }
    }
    is_stale = false;

    for (auto & [buft, d] : devices) {
        const int32_t idx[2] = { (int32_t) i_row, (int32_t) (1 - i_row) };
        std::copy_n((const char *) idx, sizeof(idx), (char *) (d.now_host.data() + NOW_IDX));

        for (const auto & lane : lanes) {
            if (lane.buft != buft || !is_single) {
                continue;
            }
            // all layers have judged the same tokens
            const auto  w   = lane.anchor.next();
            const bool  may = may_skip && lane.anchor.n_judged() >= std::max(1u, p.n_warmup);
            const float weights[5] = { w.share, w.keep, w.gain, w.first, may ? 1.0f : 0.0f };

            std::copy_n(weights, 5, d.now_host.data() + NOW_WEIGHTS);

            for (uint32_t h = 0; h < lane.n_head; ++h) {
                d.now_host[NOW_ROWS + lane.i_head + h] = (float) (scores.row_of_step(lane.i_layer, h) - scores.row_never_read());
            }
        }
        put(d.now, d.now_host.data(), 0, d.now_host.size()*sizeof(float));
    }
}

void llama_kv_filter::read_gates() {
    std::vector<float> gates;

    for (auto & [buft, d] : devices) {
        gates.resize(d.n_lane);
        ggml_backend_tensor_get(d.gates, gates.data(), 0, gates.size()*sizeof(float));
        traffic.n_reads++;

        for (auto & lane : lanes) {
            if (lane.buft == buft) {
                lane.is_skipped = gates[lane.i_lane] == 0.0f;
            }
        }
    }
}

void llama_kv_filter::fetch(lane & l) const {
    std::vector<float> k(l.k->ne[0]);
    std::vector<float> v(l.v->ne[0]);

    llama_kv_filter_anchor::control c;

    ggml_backend_tensor_get(l.k,       k.data(), i_row*l.k->nb[1],       l.k->nb[1]);
    ggml_backend_tensor_get(l.v,       v.data(), i_row*l.v->nb[1],       l.v->nb[1]);
    ggml_backend_tensor_get(l.control, &c,       i_row*l.control->nb[1], sizeof(c));

    l.anchor.set(k.data(), v.data(), c);
}

//
// nodes
//

// the anchor once the tokens have come: [n_embd, 1]; cur: [n_embd_head, n_head_kv, n_tokens]
ggml_tensor * llama_kv_filter::build_faded(ggml_context * ctx, const device & d, ggml_tensor * anchor, ggml_tensor * cur) const {
    const int64_t n_embd = anchor->ne[0];
    const int64_t n      = cur->ne[2];

    ggml_tensor * came;
    if (n == 1) {
        came = ggml_scale(ctx, ggml_reshape_2d(ctx, cur, n_embd, 1), 1.0f - llama_kv_filter_anchor::MEMORY);
    } else {
        ggml_tensor * rows   = ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_2d(ctx, cur, n_embd, n))); // [n, n_embd]
        ggml_tensor * powers = ggml_view_1d(ctx, d.powers, n, (d.powers->ne[0] - n)*sizeof(float));

        came = ggml_reshape_2d(ctx, ggml_sum_rows(ctx, ggml_mul(ctx, rows, powers)), n_embd, 1);
    }

    return ggml_add(ctx, ggml_scale(ctx, anchor, std::pow(llama_kv_filter_anchor::MEMORY, (float) n)), came);
}

// over the heads; cosines: [n_head_kv]
struct moments { ggml_tensor * mean; ggml_tensor * variance; };

static moments build_cosines(ggml_context * ctx, ggml_tensor * anchor, ggml_tensor * cur) {
    anchor = ggml_reshape_2d(ctx, anchor, cur->ne[0], cur->ne[1]);

    ggml_tensor * dots = ggml_sum_rows(ctx, ggml_mul(ctx, ggml_l2_norm(ctx, cur, 1e-20f), ggml_l2_norm(ctx, anchor, 1e-20f)));
    ggml_tensor * x    = ggml_reshape_1d(ctx, dots, cur->ne[1]);
    ggml_tensor * mean = ggml_mean(ctx, x);

    return { mean, ggml_mean(ctx, ggml_sqr(ctx, ggml_sub(ctx, x, mean))) };
}

// 0 if the token is left out, else 1; control becomes what it is after the token
ggml_tensor * llama_kv_filter::build_gate(ggml_context * ctx, const device & d, ggml_tensor * similarity, ggml_tensor * & control) const {
    const auto of_now = [&](int i) { return ggml_view_1d(ctx, d.now, 1, (NOW_WEIGHTS + i)*sizeof(float)); };
    const auto part   = [&](int i) { return ggml_view_1d(ctx, control, 1, i*sizeof(float)); };

    ggml_tensor * mean      = part(0);
    ggml_tensor * distance  = part(1);
    ggml_tensor * threshold = part(2);

    // a number that is none becomes 2 or -2, and is not alike
    ggml_tensor * r     = ggml_clamp(ctx, similarity, -2.0f, 2.0f);
    ggml_tensor * valid = ggml_step(ctx, ggml_scale_bias(ctx, ggml_abs(ctx, r), -1.0f, 1.5f));

    ggml_tensor * below = ggml_step(ctx, ggml_sub(ctx, threshold, r));
    ggml_tensor * alike = ggml_mul(ctx, ggml_scale_bias(ctx, below, -1.0f, 1.0f), valid);

    ggml_tensor * off = ggml_sub(ctx, r, mean);

    distance  = ggml_add(ctx, ggml_mul(ctx, distance, of_now(1)), ggml_mul(ctx, ggml_abs(ctx, off), of_now(2)));
    mean      = ggml_add(ctx, mean, ggml_mul(ctx, off, of_now(0)));
    threshold = ggml_add(ctx, threshold, ggml_mul(ctx, r, of_now(3)));

    const float step = (float) llama_kv_filter_anchor::STEP;
    threshold = ggml_add(ctx, threshold, ggml_mul(ctx, distance, ggml_scale_bias(ctx, alike, step, -step*(float) p.ratio)));

    control = ggml_concat(ctx, ggml_concat(ctx, mean, distance, 0), threshold, 0);

    return ggml_scale_bias(ctx, ggml_mul(ctx, alike, of_now(4)), -1.0f, 1.0f);
}

void llama_kv_filter::build_there(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, lane & l) const {
    const auto & d = devices.at(l.buft);

    ggml_tensor * from = ggml_view_1d(ctx, d.idx, 1, 0);
    ggml_tensor * to   = ggml_view_1d(ctx, d.idx, 1, sizeof(int32_t));

    ggml_tensor * k       = ggml_get_rows(ctx, l.k,       from);
    ggml_tensor * v       = ggml_get_rows(ctx, l.v,       from);
    ggml_tensor * control = ggml_get_rows(ctx, l.control, from);

    k_cur = ggml_is_contiguous(k_cur) ? k_cur : ggml_cont(ctx, k_cur);
    v_cur = ggml_is_contiguous(v_cur) ? v_cur : ggml_cont(ctx, v_cur);

    l.node = nullptr;
    l.rows = nullptr;

    if (k_cur->ne[2] == 1) {
        const auto of_k = build_cosines(ctx, k, k_cur);
        const auto of_v = build_cosines(ctx, v, v_cur);

        // weights by the inverse of the variance: 1/2 where both are 0
        ggml_tensor * both   = ggml_scale_bias(ctx, ggml_add(ctx, of_k.variance, of_v.variance), 1.0f, 2.0f*EPS_VARIANCE);
        ggml_tensor * weight = ggml_div(ctx, ggml_scale_bias(ctx, of_v.variance, 1.0f, EPS_VARIANCE), both);

        ggml_tensor * r = ggml_add(ctx, of_v.mean, ggml_mul(ctx, ggml_sub(ctx, of_k.mean, of_v.mean), weight));

        l.node = build_gate(ctx, d, r, control);

        ggml_tensor * rows = ggml_mul(ctx, ggml_view_2d(ctx, d.now, 1, l.n_head, sizeof(float), (NOW_ROWS + l.i_head)*sizeof(float)), l.node);

        l.rows = ggml_cast(ctx, ggml_scale_bias(ctx, rows, 1.0f, (float) scores.row_never_read()), GGML_TYPE_I32);

        ggml_build_forward_expand(gf, ggml_cpy(ctx, l.node, ggml_view_1d(ctx, d.gates, 1, l.i_lane*sizeof(float))));
        ggml_build_forward_expand(gf, l.rows);
    }

    ggml_build_forward_expand(gf, ggml_set_rows(ctx, l.k,       build_faded(ctx, d, k, k_cur), to));
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, l.v,       build_faded(ctx, d, v, v_cur), to));
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, l.control, ggml_reshape_2d(ctx, control, 3, 1), to));
}

// what reads t reads it multiplied by the gate: t is no node of the graph yet
void llama_kv_filter::gate_there(ggml_context * ctx, ggml_tensor * t, ggml_tensor * gate) {
    ggml_tensor * all = ggml_dup_tensor(ctx, t);

    all->op    = t->op;
    all->flags = t->flags;
    std::copy_n(t->op_params, GGML_MAX_OP_PARAMS/sizeof(int32_t), all->op_params);
    std::copy_n(t->src,       GGML_MAX_SRC,                       all->src);

    t->op = GGML_OP_MUL;
    std::fill_n(t->op_params, GGML_MAX_OP_PARAMS/sizeof(int32_t), 0);
    std::fill_n(t->src,       GGML_MAX_SRC,                       nullptr);
    t->src[0] = all;
    t->src[1] = gate;
}

//
// what the scores do for it
//

// a single token: only where it is not left out the sums fade, and start at 0 in its row
void llama_kv_scores::begin_filtered(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer, ggml_tensor * gate) const {
    const auto & l = *states[i_layer];
    const auto & d = devices.at(l.buft);

    ggml_tensor * acc = l.weights.t;

    const int64_t n_head = acc->ne[1];

    if (needs.decay != 1.0f) {
        ggml_tensor * all = ggml_view_2d(ctx, acc, n_rows, n_head, acc->nb[1], 0);

        ggml_build_forward_expand(gf, ggml_mul_inplace(ctx, all, ggml_scale_bias(ctx, gate, needs.decay - 1.0f, 1.0f)));
    }

    ggml_tensor * dst  = ggml_view_3d(ctx, acc, 1, n_rows, n_head, acc->nb[0], acc->nb[1], 0);
    ggml_tensor * zero = ggml_view_3d(ctx, d.zeros, 1, 1, n_head, sizeof(float), sizeof(float), 0);

    ggml_build_forward_expand(gf, ggml_set_rows(ctx, dst, zero, filter->get_rows(i_layer)));
}

// KV heads of the layers before the filtered ones
uint32_t llama_kv_scores::n_head_unfiltered(const device & d) const {
    uint32_t res = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
        res += &devices.at(states[i]->buft) == &d && !(filter && filter->has(i)) ? layers[i].n_head_kv : 0;
    }
    return res;
}

// the host chooses: where a token was left out nobody has gone, and the victim is the next one still
bool llama_kv_scores::choose_beside_skipped() {
    const auto & st = step[0];

    if (!choose(st.seq, 1, st.next, false)) {
        return false;
    }
    for (uint32_t unit = 0; unit < units_[st.seq].n_unit(); ++unit) {
        if (filter->is_skipped(layer_of(unit))) {
            choices[st.seq].slots[unit] = st.unit_slots[unit];
        }
    }
    return true;
}
