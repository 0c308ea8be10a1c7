#include "llama-kv-scores.h"

#include "llama-impl.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

// most bytes that a tile of recomputed weights may take
static constexpr int64_t TILE_BYTES = 16*1024*1024;

// op_params of the custom operations that hold our own numbers, behind ggml's
enum { PARAM_FIRST = 12, PARAM_T0 = 13, PARAM_T = 14 };

struct llama_kv_scores::scratch {
    uint32_t         n     = 0;
    uint32_t         n_old = 0;
    const uint32_t * slots = nullptr;
    const int32_t  * pos   = nullptr;

    bool is_dense = false; // slots[i] == i

    std::vector<uint32_t> slots_buf;
    std::vector<int32_t>  pos_buf;

    std::vector<float> sum;
    std::vector<float> den;
    std::vector<float> out;
    std::vector<float> out_den;
    std::vector<float> weights;
    std::vector<float> k_norm;
    std::vector<float> v_norm;
    std::vector<float> k_rows;
    std::vector<float> v_rows;
};

// pages are neighbours by rank
static llama_kv_rule_needs with_order(llama_kv_rule_needs needs, bool pages) {
    needs.ordered = needs.ordered || pages;
    return needs;
}

llama_kv_scores::llama_kv_scores(const llama_kv_rule & rule, const params & p, const std::vector<llama_kv_layer> & layers, uint32_t n_stream,
        std::vector<float> had) :
    rule(rule), needs(with_order(rule.needs(), p.pages)), p(p), layers(layers), n_slots((uint32_t) layers[0].k->ne[1]), n_stream(n_stream), choices(n_stream) {
    heads.push_back(0);
    for (const auto & layer : layers) {
        heads.push_back(heads.back() + layer.n_head_kv);
    }

    iota.resize(n_slots);
    for (uint32_t i = 0; i < n_slots; ++i) {
        iota[i] = i;
    }

    const uint32_t n_lane = p.scope == LLAMA_KV_SCOPE_TOKEN ? 1 : p.scope == LLAMA_KV_SCOPE_LAYER ? (uint32_t) layers.size() : heads.back();

    lanes_.assign(n_stream, llama_kv_lanes(n_lane, n_slots, p.compact));

    if (needs.drawn) {
        drawn.assign(n_stream, std::vector<float>((size_t) n_lane*n_slots));
    }

    std::map<ggml_backend_buffer_type_t, uint32_t> n_planes;

    for (size_t i = 0; i < layers.size(); ++i) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layers[i].k->buffer);
        ggml_backend_dev_t         dev  = ggml_backend_buft_get_device(buft);

        auto & d = devices[buft];

        d.is_cpu = ggml_backend_buft_is_host(buft) && (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU);
        all_cpu  = all_cpu && d.is_cpu;

        auto state = std::make_unique<layer_state>();
        state->buft    = buft;
        state->owner   = this;
        state->i_layer = i;
        state->i_head   = d.n_head;
        state->i_embd_v = d.n_embd_v;
        states.push_back(std::move(state));

        d.n_head   += layers[i].n_head_kv;
        d.n_embd_v += layers[i].v ? (uint32_t) layers[i].v->ne[0] : 0;
    }

    for (auto & [buft, d] : devices) {
        d.ctx.reset(ggml_init({ (3*layers.size() + 8)*ggml_tensor_overhead(), nullptr, true }));

        ggml_context * ctx = d.ctx.get();

        uint32_t n_head_max = 0;

        const int64_t n_tokens = p.n_ubatch + n_stream; // upstream reserves for a multiple of the streams

        for (size_t i = 0; i < layers.size(); ++i) {
            auto & l = *states[i];
            if (l.buft != buft) {
                continue;
            }
            n_head_max = std::max(n_head_max, layers[i].n_head_kv);

            const auto add = [&](plane & pl, bool is_needed) {
                if (is_needed) {
                    pl.t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_slots, layers[i].n_head_kv, n_stream);
                }
            };
            add(l.weights, needs.weights);
            add(l.k_norm,  needs.k_l2);
            add(l.v_norm,  needs.v_l1 || needs.v_l2);
        }

        d.idx_head  = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, d.n_head*n_stream);
        if (p.v_trans && is_per_head()) {
            d.idx_v = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, d.n_embd_v*n_stream);
        }
        d.idx_chunk = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
        d.zeros     = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_tokens*n_head_max);
        d.powers    = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, p.n_ubatch);

        const int64_t n_had = std::lround(std::sqrt((double) had.size()));
        if (needs.v_l1 && n_had > 0) {
            d.had_v = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_had, n_had);
        }

        d.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft));
        if (!d.buf) {
            throw std::runtime_error("failed to allocate buffer for the scores of the tokens");
        }
        ggml_backend_buffer_clear(d.buf.get(), 0);

        std::vector<float> powers(p.n_ubatch);
        for (uint32_t i = 0; i < p.n_ubatch; ++i) {
            powers[i] = std::pow(needs.decay, (float) (p.n_ubatch - 1 - i));
        }
        ggml_backend_tensor_set(d.powers, powers.data(), 0, ggml_nbytes(d.powers));

        if (d.had_v) {
            ggml_backend_tensor_set(d.had_v, had.data(), 0, ggml_nbytes(d.had_v));
        }
    }
}

size_t llama_kv_scores::n_bytes() const {
    size_t res = 0;
    for (const auto & l : states) {
        for (const plane * pl : { &l->weights, &l->k_norm, &l->v_norm }) {
            res += pl->t ? ggml_nbytes(pl->t) : 0;
        }
    }
    return res;
}

size_t llama_kv_scores::n_bytes_ledger() const {
    size_t res = 0;
    for (const auto & l : lanes_) {
        res += (size_t) l.n_lane()*l.n_slots()*sizeof(int32_t);
    }
    for (const auto & d : drawn) {
        res += d.size()*sizeof(float);
    }
    return res;
}

//
// host data
//

const float * llama_kv_scores::data(const plane & pl, uint32_t strm, uint32_t i_head) const {
    if (!pl.t) {
        return nullptr;
    }

    return pl.host.empty() ? (const float *) ((const char *) pl.t->data + i_head*pl.t->nb[1] + strm*pl.t->nb[2]) : pl.host.data() + (size_t) i_head*n_slots;
}

const float * llama_kv_scores::get_weights(uint32_t strm, size_t i_layer, uint32_t i_head) {
    if (!all_cpu) {
        fetch(strm);
    }
    return data(states[i_layer]->weights, strm, i_head);
}

void llama_kv_scores::fetch(uint32_t strm) {
    for (size_t i = 0; i < layers.size(); ++i) {
        auto & l = *states[i];

        if (devices.at(l.buft).is_cpu) {
            continue;
        }

        for (plane * pl : { &l.weights, &l.k_norm, &l.v_norm }) {
            if (pl->t) {
                pl->host.resize((size_t) n_slots*layers[i].n_head_kv);
                ggml_backend_tensor_get(pl->t, pl->host.data(), strm*pl->t->nb[2], pl->t->nb[2]);
            }
        }

        const auto get = [&](ggml_tensor * t, std::vector<uint8_t> & to, bool is_needed) {
            if (is_needed && t) {
                to.resize(ggml_nbytes(t));
                ggml_backend_tensor_get(t, to.data(), 0, to.size());
            }
        };
        get(layers[i].k_stream[strm], l.k_host, needs.k_rows);
        get(layers[i].v_stream[strm], l.v_host, needs.v_rows);
    }
}

void llama_kv_scores::read_rows(uint32_t strm, size_t i_layer, uint32_t i_head, bool is_v, const scratch & s, std::vector<float> & out) const {
    const auto & l    = *states[i_layer];
    const auto & host = is_v ? l.v_host : l.k_host;

    const ggml_tensor * t = is_v ? layers[i_layer].v_stream[strm] : layers[i_layer].k_stream[strm];

    const auto * src    = host.empty() ? (const uint8_t *) t->data : host.data();
    const auto * traits = ggml_get_type_traits(t->type);

    const size_t n_embd = t->ne[0]/layers[i_layer].n_head_kv;

    out.resize(s.n*n_embd);

    if (!is_v || !p.v_trans) {
        const size_t offs = ggml_row_size(t->type, i_head*n_embd);

        for (uint32_t i = 0; i < s.n; ++i) {
            const uint8_t * row = src + s.slots[i]*t->nb[1] + offs;

            if (t->type == GGML_TYPE_F32) {
                memcpy(out.data() + i*n_embd, row, n_embd*sizeof(float));
            } else {
                traits->to_float(row, out.data() + i*n_embd, n_embd);
            }
        }
        return;
    }

    // transposed: [n_slots, n_embd_v_gqa]
    std::vector<float> line(n_slots);

    for (size_t c = 0; c < n_embd; ++c) {
        const uint8_t * row = src + ggml_row_size(t->type, n_slots)*(i_head*n_embd + c);

        if (t->type == GGML_TYPE_F32) {
            memcpy(line.data(), row, n_slots*sizeof(float));
        } else {
            traits->to_float(row, line.data(), n_slots);
        }
        for (uint32_t i = 0; i < s.n; ++i) {
            out[i*n_embd + c] = line[s.slots[i]];
        }
    }
}

//
// choice
//

void llama_kv_scores::view_lane(uint32_t strm, uint32_t lane, scratch & s) const {
    const auto & lanes = lanes_[strm];

    const int32_t * pos = lanes.pos(lane);

    s.is_dense = !needs.ordered && is_per_head();

    // the kept tokens fill the first slots
    if (s.is_dense) {
        s.n     = lanes.n_used();
        s.slots = iota.data();
        s.pos   = pos;
        return;
    }

    s.slots_buf.clear();
    for (uint32_t i = 0; i < n_slots; ++i) {
        if (pos[i] != llama_kv_lanes::none) {
            s.slots_buf.push_back(i);
        }
    }
    if (needs.ordered) {
        std::sort(s.slots_buf.begin(), s.slots_buf.end(), [pos](uint32_t a, uint32_t b) { return pos[a] < pos[b]; });
    }

    s.n = (uint32_t) s.slots_buf.size();
    s.pos_buf.resize(s.n);
    for (uint32_t i = 0; i < s.n; ++i) {
        s.pos_buf[i] = pos[s.slots_buf[i]];
    }

    s.slots = s.slots_buf.data();
    s.pos   = s.pos_buf.data();
}

// the numbers of the view's tokens
static const float * in_view(const float * data, uint32_t n, const uint32_t * slots, bool is_dense, std::vector<float> & buf) {
    if (!data || is_dense) {
        return data;
    }

    buf.resize(n);
    for (uint32_t i = 0; i < n; ++i) {
        buf[i] = data[slots[i]];
    }

    return buf.data();
}

void llama_kv_scores::sum_lane(uint32_t strm, uint32_t lane, const range & r, uint32_t first, uint32_t nth, scratch & s) const {
    view_lane(strm, lane, s);

    s.n_old = !needs.ordered ? s.n : (uint32_t) (std::upper_bound(s.pos, s.pos + s.n, r.pos_max) - s.pos);

    s.sum.resize(s.n);
    s.den.resize(needs.ratio ? s.n : 0);

    // the units of the lane: (layer, KV head)
    size_t i0 = 0;
    size_t i1 = layers.size();
    if (p.scope == LLAMA_KV_SCOPE_LAYER) {
        i0 = lane;
        i1 = lane + 1;
    } else if (p.scope == LLAMA_KV_SCOPE_HEAD) {
        i0 = (size_t) (std::upper_bound(heads.begin(), heads.end(), lane) - heads.begin()) - 1;
        i1 = i0 + 1;
    }

    bool is_first = true;

    for (size_t i = i0; i < i1; ++i) {
        const auto & l = *states[i];

        for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
            if (p.scope == LLAMA_KV_SCOPE_HEAD ? heads[i] + h != lane : (heads[i] + h) % nth != first) {
                continue;
            }

            llama_kv_head_view view = {};

            view.n       = s.n;
            view.n_old   = s.n_old;
            view.n_group = layers[i].n_head/layers[i].n_head_kv;
            view.pos     = s.pos;
            view.weights = in_view(needs.drawn ? drawn[strm].data() + (size_t) lane*n_slots : data(l.weights, strm, h), s.n, s.slots, s.is_dense, s.weights);
            view.k_norm  = in_view(data(l.k_norm, strm, h), s.n, s.slots, s.is_dense, s.k_norm);
            view.v_norm  = in_view(data(l.v_norm, strm, h), s.n, s.slots, s.is_dense, s.v_norm);

            if (needs.k_rows) {
                read_rows(strm, i, h, false, s, s.k_rows);
                view.k_rows   = s.k_rows.data();
                view.n_embd_k = (uint32_t) layers[i].k->ne[0]/layers[i].n_head_kv;
            }
            if (needs.v_rows) {
                read_rows(strm, i, h, true, s, s.v_rows);
                view.v_rows   = s.v_rows.data();
                view.n_embd_v = (uint32_t) layers[i].v->ne[0]/layers[i].n_head_kv;
            }

            if (is_first) {
                rule.score(view, s.sum.data(), needs.ratio ? s.den.data() : nullptr);
                is_first = false;
                continue;
            }

            s.out.resize(s.n);
            s.out_den.resize(s.den.size());

            rule.score(view, s.out.data(), needs.ratio ? s.out_den.data() : nullptr);

            for (uint32_t j = 0; j < s.n; ++j) {
                s.sum[j] += s.out[j];
            }
            for (size_t j = 0; j < s.den.size(); ++j) {
                s.den[j] += s.out_den[j];
            }
        }
    }

    // a thread without a unit
    if (is_first) {
        std::fill(s.sum.begin(), s.sum.end(), 0.0f);
        std::fill(s.den.begin(), s.den.end(), 0.0f);
    }
}

void llama_kv_scores::pick(uint32_t lane, uint32_t n, const range & r, bool chunk, const scratch & s, std::vector<uint32_t> & out) const {
    struct item { float worth; int32_t pos; uint32_t slot; };

    const auto before = [](const item & a, const item & b) { return a.worth != b.worth ? a.worth < b.worth : a.pos < b.pos; };

    const auto is_candidate = [&](uint32_t i) { return s.pos[i] >= r.pos_min && s.pos[i] <= r.pos_max; };

    // a number that is none goes first, and compares
    const auto clean = [](float x) { return x == x ? x : -std::numeric_limits<float>::infinity(); };

    const size_t i_out = (size_t) lane*n;

    if (p.pages && !chunk) {
        const uint32_t page = p.evict_every;

        double   best   = std::numeric_limits<double>::infinity();
        uint32_t i_best = UINT32_MAX;

        for (uint32_t i = 0; i + page <= s.n; i += page) {
            double num = 0.0;
            double den = 0.0;
            bool   all = true;

            for (uint32_t j = i; j < i + page; ++j) {
                num += s.sum[j];
                den += s.den[j];
                all  = all && is_candidate(j);
            }
            if (all && (i_best == UINT32_MAX || num/den < best)) {
                best   = num/den;
                i_best = i;
            }
        }

        GGML_ASSERT(i_best != UINT32_MAX && n == page);

        for (uint32_t j = 0; j < page; ++j) {
            out[i_out + j] = s.slots[i_best + j];
        }
        return;
    }

    const auto worth = [&](uint32_t i) { return clean(needs.ratio ? s.sum[i]/s.den[i] : s.sum[i]); };

    if (n == 1) {
        item best = { std::numeric_limits<float>::infinity(), INT32_MAX, UINT32_MAX };

        // few tokens pass the first comparison
        for (uint32_t i = 0; i < s.n; ++i) {
            if (!(s.sum[i] > best.worth) || needs.ratio) {
                const item it = { worth(i), s.pos[i], s.slots[i] };
                if (is_candidate(i) && before(it, best)) {
                    best = it;
                }
            }
        }

        GGML_ASSERT(best.slot != UINT32_MAX);

        out[i_out] = best.slot;
        return;
    }

    std::vector<item> items;
    items.reserve(s.n);
    for (uint32_t i = 0; i < s.n; ++i) {
        if (is_candidate(i)) {
            items.push_back({ worth(i), s.pos[i], s.slots[i] });
        }
    }

    GGML_ASSERT(items.size() >= n);

    std::partial_sort(items.begin(), items.begin() + n, items.end(), before);

    for (uint32_t i = 0; i < n; ++i) {
        out[i_out + i] = items[i].slot;
    }
}

uint32_t llama_kv_scores::n_candidates(uint32_t strm, const range & r) const {
    const int32_t * pos = lanes_[strm].pos(0);

    return (uint32_t) std::count_if(pos, pos + n_slots, [&](int32_t q) { return q >= r.pos_min && q <= r.pos_max; });
}

void llama_kv_scores::choose(uint32_t strm, uint32_t n, const range & r, bool chunk) {
    if (!all_cpu) {
        fetch(strm);
    }

    n = n == 1 ? 1 : std::min(n, n_candidates(strm, r));

    auto & c = choices[strm];

    c.n = n;
    c.i = 0;
    c.slots.resize((size_t) n*lanes_[strm].n_lane());

    scratch s;
    for (uint32_t lane = 0; lane < lanes_[strm].n_lane(); ++lane) {
        sum_lane(strm, lane, r, 0, 1, s);
        pick(lane, n, r, chunk, s, c.slots);
    }
}

void llama_kv_scores::close_gaps(uint32_t strm, const std::vector<uint32_t> & victims) {
    auto & c = choices[strm];

    for (size_t lane = 0; lane < victims.size(); ++lane) {
        for (uint32_t i = c.i; i < c.n; ++i) {
            c.slots[lane*c.n + i] -= c.slots[lane*c.n + i] > victims[lane];
        }
    }
}

//
// one ubatch
//

void llama_kv_scores::save_drawn(uint32_t strm, uint32_t lane, uint32_t slot, int32_t pos) {
    // splitmix64 (Steele, Lea, Flood 2014)
    uint64_t z = ((uint64_t) pos + ((uint64_t) lane << 32) + 1)*0x9e3779b97f4a7c15ull;

    z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27))*0x94d049bb133111ebull;
    z =  z ^ (z >> 31);

    drawn[strm][(size_t) lane*n_slots + slot] = (float) (z >> 40)/(1 << 24);
}

void llama_kv_scores::set_step(const std::vector<stream_step> & now) {
    step = now;

    found_.clear();
    found_.resize(step.size());

    for (size_t i = 0; i < step.size(); ++i) {
        auto & f = found_[i];

        if (step[i].want) {
            f.c.n = p.evict_every == 1 ? 1 : std::min(p.evict_every, n_candidates(step[i].strm, step[i].next));
            f.c.slots.resize((size_t) f.c.n*lanes_[step[i].strm].n_lane());

            if (p.scope == LLAMA_KV_SCOPE_TOKEN) {
                f.sum.resize(GGML_MAX_N_THREADS);
                f.den.resize(GGML_MAX_N_THREADS);
            }
        }
    }

    for (const auto & st : step) {
        const uint32_t n_lane = lanes_[st.strm].n_lane();

        if (needs.drawn) {
            for (uint32_t lane = 0; lane < n_lane; ++lane) {
                const int32_t * pos = lanes_[st.strm].pos(lane);

                for (const uint32_t slot : st.slots) {
                    save_drawn(st.strm, lane, slot, pos[slot]);
                }
                if (!st.lane_slots.empty()) {
                    save_drawn(st.strm, lane, st.lane_slots[lane], pos[st.lane_slots[lane]]);
                }
            }
        }

        if (st.clear) {
            for (const auto & l : states) {
                const std::vector<uint8_t> zeros(l->weights.t->nb[2]);
                ggml_backend_tensor_set(l->weights.t, zeros.data(), st.strm*l->weights.t->nb[2], zeros.size());
            }
        }
    }

    const bool one = std::all_of(step.begin(), step.end(), [](const auto & st) { return st.slots.size() + st.lane_slots.size() > 0 &&
            (st.slots.size() == 1 || !st.lane_slots.empty()); });

    std::vector<int64_t> chunk;
    for (const auto & st : step) {
        chunk.insert(chunk.end(), st.slots.begin(), st.slots.end());
    }

    for (auto & [buft, d] : devices) {
        if (!one) {
            ggml_backend_tensor_set(d.idx_chunk, chunk.data(), 0, chunk.size()*sizeof(int64_t));
            continue;
        }

        // layout: [n_stream][n_head_kv] per layer
        std::vector<int64_t> idx((size_t) d.n_head*n_stream, 0);

        for (size_t i = 0; i < layers.size(); ++i) {
            if (states[i]->buft != buft) {
                continue;
            }
            for (const auto & st : step) {
                for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
                    idx[(size_t) states[i]->i_head*n_stream + st.strm*layers[i].n_head_kv + h] =
                        st.lane_slots.empty() ? st.slots[0] : st.lane_slots[lane_of(i, h)];
                }
            }
        }
        ggml_backend_tensor_set(d.idx_head, idx.data(), 0, idx.size()*sizeof(int64_t));

        if (!d.idx_v) {
            continue;
        }

        std::vector<int64_t> idx_v((size_t) d.n_embd_v*n_stream, 0);

        for (size_t i = 0; i < layers.size(); ++i) {
            const auto & l = *states[i];
            if (l.buft != buft || !layers[i].v) {
                continue;
            }

            const int64_t n_embd = layers[i].v->ne[0]/layers[i].n_head_kv;

            for (const auto & st : step) {
                for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
                    const int64_t slot = idx[(size_t) l.i_head*n_stream + st.strm*layers[i].n_head_kv + h];

                    int64_t * to = idx_v.data() + (size_t) l.i_embd_v*n_stream + st.strm*layers[i].v->ne[0];
                    for (int64_t c = h*n_embd; c < (h + 1)*n_embd; ++c) {
                        to[c] = c*n_slots + slot;
                    }
                }
            }
        }
        ggml_backend_tensor_set(d.idx_v, idx_v.data(), 0, idx_v.size()*sizeof(int64_t));
    }
}

void llama_kv_scores::commit() {
    for (size_t i = 0; i < step.size(); ++i) {
        auto & f = found_[i];

        if (!f.done || !step[i].want) {
            continue;
        }

        if (p.scope == LLAMA_KV_SCOPE_TOKEN) {
            scratch s;
            view_lane(step[i].strm, 0, s);

            s.sum.assign(s.n, 0.0f);
            s.den.assign(needs.ratio ? s.n : 0, 0.0f);
            for (size_t t = 0; t < f.sum.size() && !f.sum[t].empty(); ++t) {
                for (uint32_t j = 0; j < s.n; ++j) {
                    s.sum[j] += f.sum[t][j];
                }
                for (size_t j = 0; j < s.den.size(); ++j) {
                    s.den[j] += f.den[t][j];
                }
            }

            pick(0, f.c.n, step[i].next, false, s, f.c.slots);
        }

        choices[step[i].strm] = std::move(f.c);
    }

    step.clear();
    found_.clear();
}

//
// custom operations on the CPU
//

void llama_kv_scores::op_add(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & l = *(const layer_state *) data;
    const auto & s = *l.owner;

    const ggml_tensor * sm = dst->src[0]; // [n_kv, n, n_head, ns]

    const int64_t n_kv   = sm->ne[0];
    const int64_t n      = sm->ne[1];
    const int64_t n_head = sm->ne[2];
    const int64_t n_hkv  = s.layers[l.i_layer].n_head_kv;
    const int64_t group  = n_head/n_hkv;

    const int64_t t0 = dst->op_params[PARAM_T0];
    const int64_t T  = dst->op_params[PARAM_T];

    // each thread has its slots, in whole cache lines
    const int64_t per = GGML_PAD((n_kv + nth - 1)/nth, 16);
    const int64_t j0  = std::min(n_kv, per*ith);
    const int64_t j1  = std::min(n_kv, j0 + per);

    const float decay_all = std::pow(s.needs.decay, (float) T);

    for (size_t is = 0; is < s.step.size(); ++is) {
        const auto & st = s.step[is];

        for (int64_t h = 0; h < n_hkv; ++h) {
            float * acc = (float *) ((char *) l.weights.t->data + h*l.weights.t->nb[1] + st.strm*l.weights.t->nb[2]);

            if (dst->op_params[PARAM_FIRST]) {
                if (s.needs.decay != 1.0f) {
                    for (int64_t j = j0; j < j1; ++j) {
                        acc[j] *= decay_all;
                    }
                }

                const auto zero = [&](int64_t slot) {
                    if (slot >= j0 && slot < j1) {
                        acc[slot] = 0.0f;
                    }
                };
                for (const uint32_t slot : st.slots) {
                    zero(slot);
                }
                if (!st.lane_slots.empty()) {
                    zero(st.lane_slots[s.lane_of(l.i_layer, (uint32_t) h)]);
                }
            }

            for (int64_t g = 0; g < group; ++g) {
                for (int64_t t = std::max<int64_t>(0, s.first_query(T) - t0); t < n; ++t) {
                    const float * row = (const float *) ((const char *) sm->data + t*sm->nb[1] + (h*group + g)*sm->nb[2] + is*sm->nb[3]);

                    if (s.needs.decay == 1.0f) {
                        for (int64_t j = j0; j < j1; ++j) {
                            acc[j] += row[j];
                        }
                    } else {
                        const float w = std::pow(s.needs.decay, (float) (T - 1 - t0 - t));
                        for (int64_t j = j0; w > 0.0f && j < j1; ++j) {
                            acc[j] += w*row[j];
                        }
                    }
                }
            }
        }
    }
}

void llama_kv_scores::op_choose(ggml_tensor * dst, int ith, int nth, void * data) {
    auto & s = *(const llama_kv_scores *) data;

    GGML_UNUSED(dst);

    scratch sc;

    for (size_t is = 0; is < s.step.size(); ++is) {
        const auto & st = s.step[is];

        auto & f = s.found_[is];

        if (!st.want) {
            continue;
        }

        if (s.p.scope == LLAMA_KV_SCOPE_TOKEN) {
            s.sum_lane(st.strm, 0, st.next, ith, nth, sc);
            f.sum[ith].swap(sc.sum);
            f.den[ith].swap(sc.den);
        } else {
            for (uint32_t lane = ith; lane < s.lanes_[st.strm].n_lane(); lane += nth) {
                s.sum_lane(st.strm, lane, st.next, 0, 1, sc);
                s.pick(lane, f.c.n, st.next, false, sc, f.c.slots);
            }
        }

        if (ith == 0) {
            f.done = true;
        }
    }
}

//
// nodes
//

uint32_t llama_kv_scores::first_query(int64_t n_tokens) const {
    const int64_t n = needs.window > 0 && n_tokens >= needs.window ? std::min(p.n_queries, needs.window) : p.n_queries;

    return (uint32_t) std::max<int64_t>(0, n_tokens - n);
}

int64_t llama_kv_scores::tile_size(int64_t n_kv, int64_t n_head) const {
    return std::max<int64_t>(8, TILE_BYTES/(n_kv*n_head*(int64_t) sizeof(float)));
}

uint32_t llama_kv_scores::n_nodes(uint32_t n_tokens) const {
    uint32_t res = 16;

    for (size_t i = 0; i < layers.size(); ++i) {
        const int64_t n_queries = n_tokens - first_query(n_tokens);
        const int64_t n_tiles   = needs.weights ? n_queries/tile_size(n_slots, layers[i].n_head) + 1 : 0;

        // a tile: softmax with soft cap, sum; the rest: zeroing and norms, per stream; a write per head
        res += (uint32_t) (20*n_tiles + n_stream*24 + 24);
    }

    return res;
}

ggml_tensor * llama_kv_scores::write(ggml_context * ctx, ggml_tensor * dst, ggml_tensor * rows, const layer_state & l, uint32_t i_layer, uint32_t strm,
        uint32_t i_tok, int64_t n) const {
    const auto & d = devices.at(l.buft);

    // [n] of all heads, or one per head
    ggml_tensor * idx = n == 1 ?
        ggml_view_2d(ctx, d.idx_head, 1, layers[i_layer].n_head_kv, sizeof(int64_t), ((size_t) l.i_head*n_stream + strm*layers[i_layer].n_head_kv)*sizeof(int64_t)) :
        ggml_view_1d(ctx, d.idx_chunk, n, i_tok*sizeof(int64_t));

    return ggml_set_rows(ctx, dst, rows, idx);
}

ggml_tensor * llama_kv_scores::build_k(ggml_context * ctx, ggml_tensor * k_cur, size_t i_layer, uint32_t s0) const {
    ggml_tensor * res = nullptr;

    const int64_t n_embd = k_cur->ne[0];
    const int64_t n_head = k_cur->ne[1];

    for (int64_t i = 0; i < k_cur->ne[2]; ++i) {
        ggml_tensor * k = layers[i_layer].k_stream[s0 + i];

        ggml_tensor * dst = ggml_view_3d(ctx, k, n_embd, n_slots, n_head, k->nb[1], ggml_row_size(k->type, n_embd), 0);
        ggml_tensor * src = ggml_view_3d(ctx, k_cur, n_embd, 1, n_head, k_cur->nb[1], k_cur->nb[1], i*k_cur->nb[2]);

        ggml_tensor * cur = write(ctx, dst, src, *states[i_layer], (uint32_t) i_layer, (uint32_t) (s0 + i), 0, 1);

        // a chain, since the caller expands the last one only
        if (res) {
            cur->src[GGML_MAX_SRC - 1] = res;
        }
        res = cur;
    }

    return res;
}

ggml_tensor * llama_kv_scores::build_v(ggml_context * ctx, ggml_tensor * v_cur, size_t i_layer, uint32_t s0) const {
    ggml_tensor * res = nullptr;

    const int64_t n_embd = v_cur->ne[0];
    const int64_t n_head = v_cur->ne[1];

    for (int64_t i = 0; i < v_cur->ne[2]; ++i) {
        ggml_tensor * v = layers[i_layer].v_stream[s0 + i];

        const auto & l = *states[i_layer];
        const auto & d = devices.at(l.buft);

        ggml_tensor * dst;
        ggml_tensor * src;
        ggml_tensor * idx;

        if (p.v_trans) {
            src = ggml_view_3d(ctx, v_cur, n_embd, n_head, 1, v_cur->nb[1], v_cur->nb[2], i*v_cur->nb[2]);
            src = ggml_is_contiguous(src) ? src : ggml_cont(ctx, src);
            src = ggml_reshape_2d(ctx, src, 1, n_embd*n_head);
            dst = ggml_reshape_2d(ctx, v, 1, ggml_nelements(v));
            idx = ggml_view_1d(ctx, d.idx_v, n_embd*n_head, ((size_t) l.i_embd_v*n_stream + (s0 + i)*n_embd*n_head)*sizeof(int64_t));
        } else {
            src = ggml_view_3d(ctx, v_cur, n_embd, 1, n_head, v_cur->nb[1], v_cur->nb[1], i*v_cur->nb[2]);
            dst = ggml_view_3d(ctx, v, n_embd, n_slots, n_head, v->nb[1], ggml_row_size(v->type, n_embd), 0);
            idx = ggml_view_2d(ctx, d.idx_head, 1, n_head, sizeof(int64_t), ((size_t) l.i_head*n_stream + (s0 + i)*n_head)*sizeof(int64_t));
        }

        ggml_tensor * cur = ggml_set_rows(ctx, dst, src, idx);

        if (res) {
            cur->src[GGML_MAX_SRC - 1] = res;
        }
        res = cur;
    }

    return res;
}

void llama_kv_scores::build_norms(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, size_t i_layer, uint32_t s0, uint32_t ns) const {
    const auto & l = *states[i_layer];
    const auto & d = devices.at(l.buft);

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

        const int64_t n_hkv = cur->ne[1];
        const int64_t n     = cur->ne[2]/ns; // tokens per stream

        for (uint32_t i = 0; i < ns; ++i) {
            ggml_tensor * src = ggml_view_3d(ctx, cur, 1, n, n_hkv, cur->nb[2], cur->nb[1], i*n*cur->nb[2]);
            ggml_tensor * dst = ggml_view_3d(ctx, pl.t, 1, n_slots, n_hkv, pl.t->nb[0], pl.t->nb[1], (s0 + i)*pl.t->nb[2]);

            ggml_build_forward_expand(gf, write(ctx, dst, src, l, (uint32_t) i_layer, s0 + i, (uint32_t) (i*n), n));
        }
    };

    if (l.k_norm.t) {
        store(l.k_norm, k_cur, false);
    }
    if (l.v_norm.t) {
        store(l.v_norm, v_cur, needs.v_l1);
    }
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

    ggml_tensor * cur = ggml_mul_mat(ctx, a.k, q);
    ggml_prec_set_acc(cur, GGML_PREC_F32);

    if (a.soft_cap > 0.0f) {
        cur = ggml_scale(ctx, cur, a.scale/a.soft_cap);
        cur = ggml_tanh (ctx, cur);
        cur = ggml_scale(ctx, cur, a.soft_cap);
    }

    cur = ggml_soft_max_ext(ctx, cur, mask, a.soft_cap > 0.0f ? 1.0f : a.scale, a.max_bias);
    ggml_soft_max_add_sinks(cur, a.sinks);

    return cur;
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

    if (first) {
        if (needs.decay != 1.0f) {
            ggml_tensor * all = ggml_view_1d(ctx, acc, acc->ne[0]*acc->ne[1]*ns, s0*acc->nb[2]);
            ggml_build_forward_expand(gf, ggml_scale_inplace(ctx, all, std::pow(needs.decay, (float) n_tokens)));
        }

        for (int64_t i = 0; i < ns; ++i) {
            ggml_tensor * dst  = ggml_view_3d(ctx, acc, 1, n_slots, n_hkv, acc->nb[0], acc->nb[1], (s0 + i)*acc->nb[2]);
            ggml_tensor * zero = ggml_view_3d(ctx, d.zeros, 1, n_tokens, n_hkv, sizeof(float), n_tokens*sizeof(float), 0);

            ggml_build_forward_expand(gf, write(ctx, dst, zero, l, (uint32_t) i_layer, (uint32_t) (s0 + i), (uint32_t) (i*n_tokens), n_tokens));
        }
    }

    if (needs.decay != 1.0f && n_tokens > 1) {
        sm = ggml_mul(ctx, sm, ggml_view_2d(ctx, d.powers, 1, n, sizeof(float), (p.n_ubatch - n_tokens + t0)*sizeof(float)));
    }

    // over the queries and over the heads of the group
    ggml_tensor * cur = ggml_reshape_4d(ctx, sm, n_kv, n*group, n_hkv, ns);
    if (n*group > 1) {
        cur = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, cur, 1, 0, 2, 3)));
    }
    cur = ggml_reshape_3d(ctx, cur, n_kv, n_hkv, ns);

    acc = ggml_view_3d(ctx, acc, n_kv, n_hkv, ns, acc->nb[1], acc->nb[2], s0*acc->nb[2]);

    ggml_build_forward_expand(gf, ggml_add_inplace(ctx, acc, cur));
}

void llama_kv_scores::build(ggml_context * ctx, ggml_cgraph * gf, const attention & a, size_t i_layer, uint32_t s0) const {
    const auto & d = devices.at(states[i_layer]->buft);

    const int64_t T = a.q->ne[1];

    if (needs.weights) {
        if (d.is_cpu && a.kq) {
            add_tile(ctx, gf, a.kq, i_layer, s0, 0, T, a.is_first);
        } else {
            const int64_t t_first = first_query(T);
            const int64_t tile    = tile_size(a.k->ne[1], a.q->ne[2]*a.q->ne[3]);

            for (int64_t t0 = t_first; t0 < T; t0 += tile) {
                const int64_t n = std::min(tile, T - t0);

                add_tile(ctx, gf, softmax(ctx, a, t0, n), i_layer, s0, t0, T, a.is_first && t0 == t_first);
            }
        }
    }

    if (a.is_last && all_cpu && T == 1) {
        ggml_tensor * src = a.q;

        ggml_build_forward_expand(gf, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &src, 1, op_choose, GGML_N_TASKS_MAX,
                    const_cast<llama_kv_scores *>(this)));
    }
}

//
// between ubatches
//

void llama_kv_scores::clear() {
    for (auto & l : lanes_) {
        l.reset();
    }
    for (auto & c : choices) {
        c = {};
    }
    for (auto & l : states) {
        if (l->weights.t) {
            const std::vector<uint8_t> zeros(ggml_nbytes(l->weights.t));
            ggml_backend_tensor_set(l->weights.t, zeros.data(), 0, zeros.size());
        }
    }

    step.clear();
    found_.clear();
}

void llama_kv_scores::move(uint32_t strm, const llama_kv_lanes::moves & moves) {
    for (size_t i = 0; i < layers.size(); ++i) {
        auto & l = *states[i];

        for (plane * pl : { &l.weights, &l.k_norm, &l.v_norm }) {
            if (!pl->t) {
                continue;
            }

            std::vector<float> tmp;

            float * data = (float *) ((char *) pl->t->data + strm*pl->t->nb[2]);

            const bool is_cpu = devices.at(l.buft).is_cpu;
            if (!is_cpu) {
                tmp.resize((size_t) n_slots*layers[i].n_head_kv);
                data = tmp.data();
                ggml_backend_tensor_get(pl->t, data, strm*pl->t->nb[2], pl->t->nb[2]);
            }

            for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
                float * row = data + (size_t) h*n_slots;

                for (const auto & m : moves[lane_of(i, h)]) {
                    row[m.dst] = row[m.src];
                }
            }

            if (!is_cpu) {
                ggml_backend_tensor_set(pl->t, data, strm*pl->t->nb[2], pl->t->nb[2]);
            }
        }
    }

    if (needs.drawn) {
        for (size_t lane = 0; lane < moves.size(); ++lane) {
            for (const auto & m : moves[lane]) {
                drawn[strm][lane*n_slots + m.dst] = drawn[strm][lane*n_slots + m.src];
            }
        }
    }
}

void llama_kv_scores::copy(uint32_t src, uint32_t dst) {
    lanes_ [dst] = lanes_ [src];
    choices[dst] = choices[src];

    if (needs.drawn) {
        drawn[dst] = drawn[src];
    }

    std::vector<uint8_t> tmp;

    for (const auto & l : states) {
        for (const plane * pl : { &l->weights, &l->k_norm, &l->v_norm }) {
            if (pl->t) {
                tmp.resize(pl->t->nb[2]);
                ggml_backend_tensor_get(pl->t, tmp.data(), src*pl->t->nb[2], tmp.size());
                ggml_backend_tensor_set(pl->t, tmp.data(), dst*pl->t->nb[2], tmp.size());
            }
        }
    }
}
