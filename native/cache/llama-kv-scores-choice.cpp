#include "llama-kv-filter.h"
#include "llama-kv-scores.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>

// which tokens a formula can spare: on the host, or by all threads at the end of the model's graph

struct llama_kv_scores::scratch {
    uint32_t         n     = 0;
    uint32_t         n_old = 0;
    const uint32_t * slots = nullptr;
    const uint32_t * rows  = nullptr; // where the slots lie
    const int32_t  * pos   = nullptr;

    bool is_dense = false; // slots[i] == rows[i] == i

    std::vector<uint32_t> slots_buf;
    std::vector<uint32_t> rows_buf;
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
    std::vector<float> state;
};

void llama_kv_scores::fetch(uint32_t strm, bool keys) {
    for (auto & [buft, d] : devices) {
        if (!d.is_cpu && d.planes) {
            get_planes(d, strm);
        }
    }

    for (size_t i = 0; i < layers.size(); ++i) {
        auto & l = *states[i];

        if (devices.at(l.buft).is_cpu) {
            continue;
        }

        const auto get = [&](ggml_tensor * t, std::vector<uint8_t> & to, bool is_needed) {
            if (is_needed && t) {
                to.resize(ggml_nbytes(t));
                ggml_backend_tensor_get(t, to.data(), 0, to.size());
                traffic.n_reads++;
            }
        };
        get(layers[i].k_stream[strm], l.k_host, needs.k_rows || keys);
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
            const uint8_t * row = src + s.rows[i]*t->nb[1] + offs;

            if (t->type == GGML_TYPE_F32) {
                memcpy(out.data() + i*n_embd, row, n_embd*sizeof(float));
            } else {
                traits->to_float(row, out.data() + i*n_embd, n_embd);
            }
        }
        return;
    }

    // transposed: [n_rows, n_embd_v_gqa]
    std::vector<float> line(n_rows);

    for (size_t c = 0; c < n_embd; ++c) {
        const uint8_t * row = src + ggml_row_size(t->type, n_rows)*(i_head*n_embd + c);

        if (t->type == GGML_TYPE_F32) {
            memcpy(line.data(), row, n_rows*sizeof(float));
        } else {
            traits->to_float(row, line.data(), n_rows);
        }
        for (uint32_t i = 0; i < s.n; ++i) {
            out[i*n_embd + c] = line[s.rows[i]];
        }
    }
}

void llama_kv_scores::view_unit(uint32_t seq, uint32_t unit, scratch & s) const {
    const auto & units = units_[seq];

    const int32_t * pos = units.pos(unit);

    s.is_dense = !needs.ordered && is_per_head();

    // the kept tokens fill the first slots
    if (s.is_dense) {
        s.n     = units.n_used();
        s.slots = iota.data();
        s.rows  = s.slots;
        s.pos   = pos;
        s.is_dense = !where.pool;
        if (where.pool) {
            where.pool->rows(seq, s.slots, s.n, s.rows_buf);
            s.rows = s.rows_buf.data();
        }
        return;
    }

    s.slots_buf.clear();
    for (uint32_t i = 0; i < n_slots; ++i) {
        if (pos[i] != llama_kv_units::none) {
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
    s.rows  = s.slots;
    s.pos   = s.pos_buf.data();
    if (where.pool) {
        where.pool->rows(seq, s.slots, s.n, s.rows_buf);
        s.rows = s.rows_buf.data();
    }
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

void llama_kv_scores::sum_unit(uint32_t seq, uint32_t unit, const range & r, uint32_t first, uint32_t nth, scratch & s) const {
    const uint32_t strm = where.stream_of(seq);

    view_unit(seq, unit, s);

    s.n_old = (uint32_t) std::count_if(s.pos, s.pos + s.n, [&](int32_t pos) { return pos <= r.pos_max; });

    s.sum.resize(s.n);
    s.den.resize(needs.ratio ? s.n : 0);

    // the heads of the unit: (layer, KV head)
    size_t i0 = 0;
    size_t i1 = layers.size();
    if (p.scope == LLAMA_KV_SCOPE_LAYER) {
        i0 = unit;
        i1 = unit + 1;
    } else if (p.scope == LLAMA_KV_SCOPE_HEAD) {
        i0 = (size_t) (std::upper_bound(heads.begin(), heads.end(), unit) - heads.begin()) - 1;
        i1 = i0 + 1;
    }

    bool is_first = true;

    for (size_t i = i0; i < i1; ++i) {
        const auto & l = *states[i];

        for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
            if (p.scope == LLAMA_KV_SCOPE_HEAD ? heads[i] + h != unit : (heads[i] + h) % nth != first) {
                continue;
            }

            llama_kv_head_view view = {};

            view.n        = s.n;
            view.n_sinks  = std::min(r.n_protect, p.n_sinks);
            view.n_pinned = r.n_protect - view.n_sinks;
            view.n_old    = s.n_old;
            view.pos_min  = r.pos_min;
            view.pos_max  = r.pos_max;
            view.n_group  = layers[i].n_head/layers[i].n_head_kv;
            view.il       = layers[i].il;
            view.i_head   = h;
            view.pos      = s.pos;
            view.weights = needs.drawn ? in_view(drawn[seq].data() + (size_t) unit*n_slots, s.n, s.slots, s.is_dense, s.weights) :
                in_view(data(l, l.weights, strm, h), s.n, s.rows, s.is_dense, s.weights);
            view.k_norm  = in_view(data(l, l.k_norm, strm, h), s.n, s.rows, s.is_dense, s.k_norm);
            view.v_norm  = in_view(data(l, l.v_norm, strm, h), s.n, s.rows, s.is_dense, s.v_norm);

            if (needs.k_rows) {
                read_rows(strm, i, h, false, s, s.k_rows);
                view.k_rows   = s.k_rows.data();
                view.n_embd_k = (uint32_t) layers[i].k->ne[0]/layers[i].n_head_kv;
            }
            if (needs.k_unrotated) {
                for (uint32_t j = 0; j < s.n; ++j) {
                    p.rope->undo(layers[i].il, s.k_rows.data() + (size_t) j*view.n_embd_k, view.n_embd_k, stands[seq][(size_t) unit*n_slots + s.slots[j]]);
                }
            }
            if (needs.v_rows) {
                read_rows(strm, i, h, true, s, s.v_rows);
                view.v_rows   = s.v_rows.data();
                view.n_embd_v = (uint32_t) layers[i].v->ne[0]/layers[i].n_head_kv;
            }

            float * state = !kept_state.empty() ? kept_state[seq].data() + (size_t) (heads[i] + h)*n_slots : nullptr;

            if (state) {
                s.state.assign(s.n, 0.0f);
                for (uint32_t j = 0; j < s.n; ++j) {
                    s.state[j] = state[s.slots[j]];
                }
                view.state = needs.state ? s.state.data() : nullptr;
                view.given = needs.given ? s.state.data() : nullptr;
            }

            s.out.resize(s.n);
            s.out_den.resize(s.den.size());

            auto & out     = is_first ? s.sum : s.out;
            auto & out_den = is_first ? s.den : s.out_den;

            formula.score(view, out.data(), needs.ratio ? out_den.data() : nullptr);

            for (uint32_t j = 0; j < s.n && view.state; ++j) {
                state[s.slots[j]] = s.state[j];
            }

            if (is_first) {
                is_first = false;
                continue;
            }

            for (uint32_t j = 0; j < s.n; ++j) {
                s.sum[j] += s.out[j];
            }
            for (size_t j = 0; j < s.den.size(); ++j) {
                s.den[j] += s.out_den[j];
            }
        }
    }

    // a thread without a head
    if (is_first) {
        std::fill(s.sum.begin(), s.sum.end(), 0.0f);
        std::fill(s.den.begin(), s.den.end(), 0.0f);
    }
}

void llama_kv_scores::lower_alike(uint32_t seq, uint32_t unit, uint32_t n, const range & r, scratch & s) const {
    std::vector<uint32_t> cand;
    for (uint32_t i = 0; i < s.n; ++i) {
        if (s.pos[i] >= r.pos_min && s.pos[i] <= r.pos_max) {
            cand.push_back(i);
        }
    }

    const uint32_t n_cand = (uint32_t) cand.size();
    const uint32_t n_best = n_cand > n ? (uint32_t) (formula.graph*(n_cand - n)) : 0;
    const uint32_t n_near = n_cand > 0 ? std::min((uint32_t) formula.graph_near, n_cand - 1) : 0;
    if (n_best == 0 || n_near == 0) {
        return;
    }

    std::vector<uint32_t> best(n_cand); // of equals the newer stays
    for (uint32_t i = 0; i < n_cand; ++i) {
        best[i] = i;
    }
    std::partial_sort(best.begin(), best.begin() + n_best, best.end(), [&](uint32_t a, uint32_t b) {
        const float x = s.sum[cand[a]];
        const float y = s.sum[cand[b]];
        return x != y ? x > y : s.pos[cand[a]] > s.pos[cand[b]];
    });

    // the mean over the heads that decide together
    std::vector<float> cosines((size_t) n_best*n_cand, 0.0f);
    uint32_t           n_heads = 0;

    for (size_t i = 0; i < layers.size(); ++i) {
        const uint32_t n_embd = (uint32_t) layers[i].k->ne[0]/layers[i].n_head_kv;

        for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
            if (unit_of(i, h) != unit) {
                continue;
            }
            n_heads++;

            read_rows(where.stream_of(seq), i, h, false, s, s.k_rows);

            const auto key = [&](uint32_t j) { return s.k_rows.data() + (size_t) cand[j]*n_embd; };
            for (uint32_t j = 0; j < n_cand; ++j) {
                const float norm = std::sqrt(llama_kv_dot(key(j), key(j), n_embd));
                for (uint32_t c = 0; c < n_embd && norm > 0.0f; ++c) {
                    key(j)[c] /= norm;
                }
            }
            for (uint32_t b = 0; b < n_best; ++b) {
                for (uint32_t j = 0; j < n_cand; ++j) {
                    cosines[(size_t) b*n_cand + j] += llama_kv_dot(key(best[b]), key(j), n_embd);
                }
            }
        }
    }

    std::vector<uint32_t> near(n_cand);
    std::vector<float>    factor(n_cand, 1.0f);

    for (uint32_t b = 0; b < n_best; ++b) {
        const float * row = cosines.data() + (size_t) b*n_cand;

        near.clear();
        for (uint32_t j = 0; j < n_cand; ++j) {
            if (j != best[b]) {
                near.push_back(j);
            }
        }
        std::partial_sort(near.begin(), near.begin() + n_near, near.end(), [&](uint32_t a, uint32_t c) { return row[a] != row[c] ? row[a] > row[c] : a < c; });

        for (uint32_t k = 0; k < n_near; ++k) {
            factor[near[k]] *= 1.0f - std::min(1.0f, std::max(0.0f, row[near[k]]/n_heads));
        }
    }

    for (uint32_t j = 0; j < n_cand; ++j) {
        s.sum[cand[j]] *= factor[j];
    }
}

bool llama_kv_scores::pick(uint32_t unit, uint32_t n, const range & r, bool chunk, const scratch & s, std::vector<uint32_t> & out) const {
    struct item { float worth; int32_t pos; uint32_t slot; };

    const auto before = [](const item & a, const item & b) { return a.worth != b.worth ? a.worth < b.worth : a.pos < b.pos; };

    const auto is_candidate = [&](uint32_t i) { return s.pos[i] >= r.pos_min && s.pos[i] <= r.pos_max; };

    // a number that is none goes first, and compares
    const auto clean = [](float x) { return x == x ? x : -std::numeric_limits<float>::infinity(); };

    const size_t i_out = (size_t) unit*n;

    if (needs.page_size > 0 && !chunk) {
        const uint32_t page = needs.page_size;

        double   best   = std::numeric_limits<double>::infinity();
        uint32_t i_best = UINT32_MAX;

        for (uint32_t i = 0; i + page <= s.n; i += page) {
            double num = 0.0;
            double den = 0.0;
            bool   all = true;

            for (uint32_t j = i; j < i + page; ++j) {
                num += s.sum[j];
                den += needs.ratio ? s.den[j] : 0.0;
                all  = all && is_candidate(j);
            }
            const double worth = needs.ratio ? num/den : num;

            if (all && (i_best == UINT32_MAX || worth < best)) {
                best   = worth;
                i_best = i;
            }
        }

        if (i_best == UINT32_MAX || n != page) {
            return false;
        }

        for (uint32_t j = 0; j < page; ++j) {
            out[i_out + j] = s.slots[i_best + j];
        }
        return true;
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

        if (best.slot == UINT32_MAX) {
            return false;
        }

        out[i_out] = best.slot;
        return true;
    }

    std::vector<item> items;
    items.reserve(s.n);
    for (uint32_t i = 0; i < s.n; ++i) {
        if (is_candidate(i)) {
            items.push_back({ worth(i), s.pos[i], s.slots[i] });
        }
    }

    if (items.size() < n) {
        return false;
    }

    std::partial_sort(items.begin(), items.begin() + n, items.end(), before);

    for (uint32_t i = 0; i < n; ++i) {
        out[i_out + i] = items[i].slot;
    }

    return true;
}

uint32_t llama_kv_scores::n_candidates(uint32_t seq, const range & r) const {
    const int32_t * pos = units_[seq].pos(0);

    return (uint32_t) std::count_if(pos, pos + n_slots, [&](int32_t q) { return q >= r.pos_min && q <= r.pos_max; });
}

uint32_t llama_kv_scores::n_queries_kept(uint32_t seq) const {
    return (uint32_t) std::count_if(query_pos[seq].begin(), query_pos[seq].end(), [](int32_t q) { return q != llama_kv_units::none; });
}

// the attention weights that the last queries give to what is kept now, each to the tokens up to its own
void llama_kv_scores::sum_window(uint32_t seq) {
    const uint32_t strm = where.stream_of(seq);

    scratch            s;
    std::vector<float> queries;
    std::vector<float> sums(n_rows);
    std::vector<float> row;

    for (size_t i = 0; i < layers.size(); ++i) {
        auto & l = *states[i];

        const ggml_tensor * k = layers[i].k_stream[strm];

        const bool is_cpu = devices.at(l.buft).is_cpu;
        if (!is_cpu) {
            l.k_host.resize(ggml_nbytes(k));
            ggml_backend_tensor_get(k, l.k_host.data(), 0, l.k_host.size());
            traffic.n_reads++;
        }

        queries.resize(l.queries->ne[0]*needs.window);
        ggml_backend_tensor_get(l.queries, queries.data(), seq*l.queries->nb[2], l.queries->nb[2]);

        std::vector<float> attn_sinks;
        if (l.attn.sinks) {
            attn_sinks.resize(layers[i].n_head);
            ggml_backend_tensor_get(l.attn.sinks, attn_sinks.data(), 0, attn_sinks.size()*sizeof(float));
        }

        const uint32_t n_group = layers[i].n_head/layers[i].n_head_kv;
        const uint32_t n_embd  = (uint32_t) (k->ne[0]/layers[i].n_head_kv);

        for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
            view_unit(seq, unit_of(i, h), s);
            read_rows(strm, i, h, false, s, s.k_rows);

            std::fill(sums.begin(), sums.end(), 0.0f);
            row.resize(s.n);

            for (uint32_t g = h*n_group; g < (h + 1)*n_group; ++g) {
                for (uint32_t w = 0; w < needs.window; ++w) {
                    const int32_t pos = query_pos[seq][w];
                    if (pos == llama_kv_units::none) {
                        continue;
                    }
                    const float * q = queries.data() + w*l.queries->ne[0] + g*n_embd;

                    float max = attn_sinks.empty() ? -std::numeric_limits<float>::infinity() : attn_sinks[g];
                    for (uint32_t j = 0; j < s.n; ++j) {
                        float x = s.pos[j] > pos ? -std::numeric_limits<float>::infinity() : l.attn.scale*llama_kv_dot(q, s.k_rows.data() + (size_t) j*n_embd, n_embd);
                        if (l.attn.soft_cap > 0.0f && s.pos[j] <= pos) {
                            x = l.attn.soft_cap*std::tanh(x/l.attn.soft_cap);
                        }
                        row[j] = x;
                        max    = std::max(max, x);
                    }

                    double sum = attn_sinks.empty() ? 0.0 : std::exp(attn_sinks[g] - max);
                    for (auto & x : row) {
                        x    = std::exp(x - max);
                        sum += x;
                    }
                    for (uint32_t j = 0; j < s.n; ++j) {
                        sums[s.rows[j]] += (float) (row[j]/sum);
                    }
                }
            }

            const size_t offs = h*l.weights.t->nb[1] + strm*l.weights.t->nb[2];
            const auto   set  = [&](uint32_t j0, uint32_t j1) {
                ggml_backend_tensor_set(l.weights.t, sums.data() + j0, offs + j0*sizeof(float), (j1 - j0)*sizeof(float));
            };
            // others have rows in a pool
            if (where.pool) {
                where.pool->for_rows(seq, 0, n_rows, set);
            } else {
                set(0, n_rows);
            }
        }

        if (!is_cpu && !needs.k_rows) {
            l.k_host.clear();
        }
    }

    n_counted[seq] = std::min(needs.window, n_queries_kept(seq));
}

bool llama_kv_scores::choose(uint32_t seq, uint32_t n, const range & r, bool chunk) {
    if (!is_window(seq)) {
        sum_window(seq);
    }
    if (!all_cpu) {
        fetch(where.stream_of(seq), chunk && formula.graph > 0.0);
    }

    // a chunk takes as many as it needs
    const uint32_t n_take = n == 1 || chunk ? n : std::min(n, n_candidates(seq, r));

    choice c;
    c.n = n_take;
    c.slots.resize((size_t) n_take*units_[seq].n_unit());

    scratch s;
    for (uint32_t unit = 0; unit < units_[seq].n_unit(); ++unit) {
        sum_unit(seq, unit, r, 0, 1, s);
        if (chunk && formula.graph > 0.0) {
            lower_alike(seq, unit, n_take, r, s);
        }

        if (!pick(unit, n_take, r, chunk, s, c.slots)) {
            return false;
        }
    }

    choices[seq] = std::move(c);

    return true;
}

void llama_kv_scores::close_gaps(uint32_t seq, const std::vector<uint32_t> & victims) {
    auto & c = choices[seq];

    for (size_t unit = 0; unit < victims.size(); ++unit) {
        for (uint32_t i = c.i; i < c.n; ++i) {
            c.slots[unit*c.n + i] -= c.slots[unit*c.n + i] > victims[unit];
        }
    }
}

bool llama_kv_scores::commit() {
    take_back_skipped();

    bool ok = !failed.exchange(false);

    if (filter && filter->may_be_skipped() && !all_cpu) {
        ok = choose_beside_skipped() && ok;
    }

    for (size_t i = 0; i < step.size() && ok; ++i) {
        auto & f = found_[i];

        behind[step[i].seq].ready = on_device && (step[i].ahead || (step[i].want && step[i].n == 1));

        if (!f.done || !step[i].want) {
            continue;
        }

        if (p.scope == LLAMA_KV_SCOPE_TOKEN) {
            scratch s;
            view_unit(step[i].seq, 0, s);

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

            ok = pick(0, f.c.n, step[i].next, false, s, f.c.slots);
        }

        choices[step[i].seq] = std::move(f.c);
    }

    for (auto & [buft, d] : devices) {
        d.now_known = d.now_known || (ok && d.advance && step.size() == 1 && step[0].n == 1);
    }

    step.clear();
    found_.clear();

    return ok;
}

void llama_kv_scores::op_choose(ggml_tensor * dst, int ith, int nth, void * data) {
    auto & s = *(const llama_kv_scores *) data;

    GGML_UNUSED(dst);

    // an exception would end the process: this is a thread of ggml's
    try {
        s.choose_part(ith, nth);
    } catch (const std::exception &) {
        s.failed = true;
    }
}

void llama_kv_scores::choose_part(int ith, int nth) const {
    const auto & s = *this;

    scratch sc;

    for (size_t is = 0; is < s.step.size(); ++is) {
        const auto & st = s.step[is];

        auto & f = s.found_[is];

        if (!st.want) {
            continue;
        }

        if (s.p.scope == LLAMA_KV_SCOPE_TOKEN) {
            s.sum_unit(st.seq, 0, st.next, ith, nth, sc);
            f.sum[ith].swap(sc.sum);
            f.den[ith].swap(sc.den);
        } else {
            for (uint32_t unit = ith; unit < s.units_[st.seq].n_unit(); unit += nth) {
                // nothing was evicted: the victim is the next one still
                if (s.filter && s.filter->is_skipped(s.layer_of(unit))) {
                    f.c.slots[unit] = st.unit_slots[unit];
                    continue;
                }
                s.sum_unit(st.seq, unit, st.next, 0, 1, sc);
                if (!s.pick(unit, f.c.n, st.next, false, sc, f.c.slots)) {
                    s.failed = true;
                }
            }
        }

        if (ith == 0) {
            f.done = true;
        }
    }
}
