#include "llama-kv-scores.h"

#include "llama-impl.h"

#include "ggml-backend.h"
#include "llama-kv-score-node.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

// what follows: pages are neighbours by rank, and keys without their rotation are keys
static llama_kv_formula_needs complete(llama_kv_formula_needs needs) {
    needs.ordered = needs.ordered || needs.page_size > 0;
    needs.k_rows  = needs.k_rows  || needs.k_unrotated;
    return needs;
}

llama_kv_scores::llama_kv_scores(const llama_kv_formula & formula, const params & p, const std::vector<llama_kv_layer> & layers,
        const llama_kv_where & where, uint32_t n_slots, uint32_t n_seq, uint32_t n_stream, std::vector<float> had) :
    formula(formula), needs(complete(formula.needs())), as_product(dynamic_cast<const llama_kv_formula_product *>(&formula)), p(p), layers(layers), where(where),
    n_slots(n_slots), n_rows((uint32_t) layers[0].k->ne[1]), n_seq(n_seq), n_stream(n_stream), behind(n_seq), choices(n_seq),
    query_pos(n_seq, std::vector<int32_t>(needs.window, llama_kv_units::none)), n_counted(n_seq, 0) {
    heads.push_back(0);
    for (const auto & layer : layers) {
        heads.push_back(heads.back() + layer.n_head_kv);
    }

    iota.resize(n_slots);
    for (uint32_t i = 0; i < n_slots; ++i) {
        iota[i] = i;
    }

    const uint32_t n_unit = p.scope == LLAMA_KV_SCOPE_TOKEN ? 1 : p.scope == LLAMA_KV_SCOPE_LAYER ? (uint32_t) layers.size() : heads.back();

    units_.assign(n_seq, llama_kv_units(n_unit, n_slots, p.compact));

    if (needs.drawn) {
        drawn.assign(n_seq, std::vector<float>((size_t) n_unit*n_slots));
    }
    if (needs.k_unrotated) {
        stands.assign(n_seq, std::vector<int32_t>((size_t) n_unit*n_slots));
    }
    if (needs.given) {
        to_come.resize(n_seq);
    }
    if (needs.state || needs.given) {
        kept_state.assign(n_seq, std::vector<float>((size_t) heads.back()*n_slots));
    }

    for (size_t i = 0; i < layers.size(); ++i) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layers[i].k->buffer);

        auto & d = devices[buft];

        d.i_first = d.n_head == 0 ? i : d.i_first;
        d.is_cpu  = llama_kv_is_cpu(buft) && !llama_kv_env_is("LLAMA_KV_SCORES", "graph") && !llama_kv_env_is("LLAMA_KV_SCORES", "node");
        all_cpu  = all_cpu && d.is_cpu;

        auto state = std::make_unique<layer_state>();
        state->buft    = buft;
        state->owner   = this;
        state->i_layer = i;
        state->i_head   = d.n_head;
        state->i_embd_v = d.n_embd_v;
        state->i_unit   = p.scope == LLAMA_KV_SCOPE_HEAD ? d.n_head : p.scope == LLAMA_KV_SCOPE_LAYER ? d.n_layer : 0;
        auto & state_of = *state;
        states.push_back(std::move(state));

        state_of.i_stack = d.n_layer++;
        d.n_head   += layers[i].n_head_kv;
        d.n_embd_v += layers[i].v ? (uint32_t) layers[i].v->ne[0] : 0;
    }

    on_device = may_choose();
    debts     = on_device && p.ranks && std::all_of(layers.begin(), layers.end(), [&](const auto & layer) {
        return layer.n_head_kv == layers[0].n_head_kv;
    });

    for (auto & [buft, d] : devices) {
        d.ctx.reset(ggml_init({ (4*layers.size() + 16)*ggml_tensor_overhead(), nullptr, true }));

        ggml_context * ctx = d.ctx.get();

        uint32_t n_head_max = 0;

        const int64_t n_tokens = p.n_ubatch + n_seq; // upstream reserves for a multiple of the streams

        d.n_kind = on_device ? kind_birth() + 1 + debts : n_kind_host();
        if (d.n_kind > 0) {
            d.planes = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_rows, d.n_head, (int64_t) n_stream*d.n_kind);
        }

        for (size_t i = 0; i < layers.size(); ++i) {
            auto & l = *states[i];
            if (l.buft != buft) {
                continue;
            }
            n_head_max = std::max(n_head_max, layers[i].n_head_kv);

            uint32_t n_kind = 0;

            const auto add = [&](plane & pl, bool is_needed) {
                if (is_needed) {
                    pl.i_kind = n_kind++;
                    pl.t      = ggml_view_3d(ctx, d.planes, n_rows, layers[i].n_head_kv, n_stream, d.planes->nb[1], d.planes->nb[2],
                            pl.i_kind*n_stream*d.planes->nb[2] + l.i_head*d.planes->nb[1]);
                }
            };
            add(l.weights, needs.weights);
            add(l.k_norm,  needs.k_l2);
            add(l.v_norm,  needs.v_l1 || needs.v_l2);

            if (needs.window > 0) {
                l.queries = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, layers[i].k->ne[0]/layers[i].n_head_kv*layers[i].n_head, needs.window, n_seq);
            }
        }

        d.idx_head  = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, d.n_head*n_seq);
        if (p.v_trans && is_per_head()) {
            d.idx_v = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, d.n_embd_v*n_seq);
        }
        d.idx_chunk = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
        if (needs.window > 0) {
            d.idx_query = ggml_new_tensor_2d(ctx, GGML_TYPE_I64, needs.window, n_seq);
        }
        d.has_node = !d.is_cpu && llama_kv_has_score_node(buft);
        if (on_device) {
            add_choice(d, ctx);
        }
        if (!d.is_cpu && needs.weights && !where.pool) {
            init_stack(d, buft, ctx);
        }
        d.zeros     = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, std::max<int64_t>(n_tokens*n_head_max, d.n_head));
        d.powers    = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, p.n_ubatch);
        if (!d.is_cpu && where.pool && needs.weights) {
            d.counts  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_tokens);
            d.shrinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_rows);
        }
        if (d.is_cpu && needs.weights) {
            d.sums = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_rows, n_head_max, n_stream);
        }

        const int64_t n_had = std::lround(std::sqrt((double) had.size()));
        if (needs.v_l1 && n_had > 0) {
            d.had_v = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_had, n_had);
        }

        d.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft));
        if (!d.buf) {
            throw std::runtime_error("failed to allocate buffer for the scores of the tokens");
        }
        ggml_backend_buffer_clear(d.buf.get(), 0);

        if (!d.is_cpu && d.planes) {
            const size_t n = (size_t) n_rows*d.n_head*d.n_kind;

            ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
            if (auto host = dev ? ggml_backend_dev_host_buffer_type(dev) : nullptr) {
                d.host_buf.reset(ggml_backend_buft_alloc_buffer(host, n*sizeof(float)));
            }
            d.host_vec.resize(d.host_buf ? 0 : n);
            d.host = d.host_buf ? (float *) ggml_backend_buffer_get_base(d.host_buf.get()) : d.host_vec.data();
        }

        std::vector<float> powers(p.n_ubatch);
        for (uint32_t i = 0; i < p.n_ubatch; ++i) {
            powers[i] = std::pow(needs.decay, (float) (p.n_ubatch - 1 - i));
        }
        ggml_backend_tensor_set(d.powers, powers.data(), 0, ggml_nbytes(d.powers));

        if (d.had_v) {
            ggml_backend_tensor_set(d.had_v, had.data(), 0, ggml_nbytes(d.had_v));
        }
        if (on_device) {
            init_choice(d, ctx);
        }
    }

    on_device = on_device && std::all_of(devices.begin(), devices.end(), [&](auto & of) { return can_choose(of.second, of.first); });
}

size_t llama_kv_scores::n_bytes() const {
    size_t res = 0;
    for (const auto & [buft, d] : devices) {
        res += d.planes ? ggml_nbytes(d.planes) : 0;
    }
    for (const auto & l : states) {
        res += l->queries ? ggml_nbytes(l->queries) : 0;
    }
    return res;
}

size_t llama_kv_scores::n_bytes_ledger() const {
    size_t res = 0;
    for (const auto & l : units_) {
        res += (size_t) l.n_unit()*l.n_slots()*sizeof(int32_t);
    }
    for (const auto & d : drawn) {
        res += d.size()*sizeof(float);
    }
    for (const auto & s : kept_state) {
        res += s.size()*sizeof(float);
    }
    for (const auto & s : stands) {
        res += s.size()*sizeof(int32_t);
    }
    return res;
}

//
// host data
//

const float * llama_kv_scores::data(const layer_state & l, const plane & pl, uint32_t strm, uint32_t i_head) const {
    if (!pl.t) {
        return nullptr;
    }
    const auto & d = devices.at(l.buft);

    return d.is_cpu ? (const float *) ((const char *) pl.t->data + i_head*pl.t->nb[1] + strm*pl.t->nb[2]) :
        d.host + ((size_t) pl.i_kind*d.n_head + l.i_head + i_head)*n_rows;
}

// a copy per kind, and one for all where there is one stream
template <typename F>
static void for_kinds(const ggml_tensor * planes, uint32_t n_kind, uint32_t n_stream, uint32_t strm, F && copy) {
    const size_t size = planes->nb[2];

    if (n_stream == 1) {
        copy(0, 0, n_kind*size);
        return;
    }
    for (uint32_t k = 0; k < n_kind; ++k) {
        copy(k*size, (k*n_stream + strm)*size, size);
    }
}

void llama_kv_scores::put(const device & d, ggml_tensor * t, const void * data, size_t offs, size_t size) {
    ggml_backend_tensor_set(t, data, offs, size);
    traffic.n_writes += !d.is_cpu;
}

void llama_kv_scores::get_planes(device & d, uint32_t strm) {
    for_kinds(d.planes, n_kind_host(), n_stream, strm, [&](size_t to, size_t from, size_t size) {
        ggml_backend_tensor_get(d.planes, (char *) d.host + to, from, size);
    });
    traffic.n_reads++;
}

void llama_kv_scores::set_planes(device & d, uint32_t strm) {
    for_kinds(d.planes, n_kind_host(), n_stream, strm, [&](size_t from, size_t to, size_t size) {
        ggml_backend_tensor_set(d.planes, (const char *) d.host + from, to, size);
    });
}

template <typename F>
void llama_kv_scores::edit(uint32_t strm, F && f) {
    for (auto & [buft, d] : devices) {
        if (!d.is_cpu && d.planes) {
            get_planes(d, strm);
        }
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        auto & l = *states[i];
        for (plane * pl : { &l.weights, &l.k_norm, &l.v_norm }) {
            if (pl->t) {
                f(i, *pl, const_cast<float *>(data(l, *pl, strm, 0)));
            }
        }
    }
    for (auto & [buft, d] : devices) {
        if (!d.is_cpu && d.planes) {
            set_planes(d, strm);
        }
    }
}

const float * llama_kv_scores::get_weights(uint32_t seq, size_t i_layer, uint32_t i_head) {
    const uint32_t strm = where.stream_of(seq);

    if (!all_cpu) {
        fetch(strm);
    }
    return data(*states[i_layer], states[i_layer]->weights, strm, i_head);
}

//
// one ubatch
//

void llama_kv_scores::save_drawn(uint32_t seq, uint32_t unit, uint32_t slot, int32_t pos) {
    drawn[seq][(size_t) unit*n_slots + slot] = draw(unit, pos);
}

void llama_kv_scores::clear_state(const seq_step & st) {
    const float first = needs.given ? NAN : 0.0f;

    for (size_t i = 0; i < layers.size(); ++i) {
        for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
            float * row = kept_state[st.seq].data() + (size_t) (heads[i] + h)*n_slots;

            for (const uint32_t slot : st.slots) {
                row[slot] = first;
            }
            if (!st.unit_slots.empty()) {
                row[st.unit_slots[unit_of(i, h)]] = first;
            }
        }
    }
}

void llama_kv_scores::set_stands(const seq_step & st, int32_t base) {
    for (uint32_t unit = 0; unit < units_[st.seq].n_unit(); ++unit) {
        int32_t * row = stands[st.seq].data() + (size_t) unit*n_slots;

        for (size_t i = 0; i < st.slots.size(); ++i) {
            row[st.slots[i]] = st.pos0 + (int32_t) i - base;
        }
        if (!st.unit_slots.empty()) {
            row[st.unit_slots[unit]] = st.pos0 - base;
        }
    }
}

void llama_kv_scores::set_stand(uint32_t seq, uint32_t slot, int32_t pos) {
    for (uint32_t unit = 0; unit < units_[seq].n_unit(); ++unit) {
        stands[seq][(size_t) unit*n_slots + slot] = pos;
    }
}

void llama_kv_scores::rotate_stands(uint32_t seq, uint32_t unit, const std::vector<llama_kv_units::rotation> & rotations) {
    for (const auto & t : rotations) {
        stands[seq][(size_t) unit*n_slots + t.slot] += t.delta;
    }
}

void llama_kv_scores::set_step(const std::vector<seq_step> & now) {
    step = now;

    for (auto & st : step) {
        st.rows      = where.of(st.seq, st.slots);
        st.unit_rows = where.of(st.seq, st.unit_slots);
    }

    found_.clear();
    found_.resize(step.size());

    for (uint32_t i = 0; i < step.size() && needs.window > 0; ++i) {
        auto & st = step[i];

        const uint32_t n = std::min(st.n, needs.window);

        std::vector<int64_t> rows;
        for (int32_t q = st.pos0 + (int32_t) (st.n - n); q < st.pos0 + (int32_t) st.n; ++q) {
            const uint32_t row = q % (int32_t) needs.window;
            query_pos[st.seq][row] = q;
            rows.push_back(where.pool ? st.seq*needs.window + row : row);
        }
        for (auto & [buft, d] : devices) {
            put(d, d.idx_query, rows.data(), lane(st.seq, where.pool ? i : 0)*d.idx_query->nb[1], rows.size()*sizeof(int64_t));
        }

        // a chunk as long as the window is taken as it is, also where fewer of its queries are to count
        n_counted[st.seq] = st.n >= needs.window ? needs.window : st.clear ? st.n : n_counted[st.seq] == UINT32_MAX ? UINT32_MAX : n_counted[st.seq] + st.n;

        st.want = st.want && is_window(st.seq); // else it is seen to when victims are needed
    }

    for (size_t i = 0; i < step.size(); ++i) {
        auto & f = found_[i];

        if (step[i].want) {
            f.c.n = p.evict_every == 1 ? 1 : std::min(p.evict_every, n_candidates(step[i].seq, step[i].next));
            f.c.slots.resize((size_t) f.c.n*units_[step[i].seq].n_unit());

            if (p.scope == LLAMA_KV_SCOPE_TOKEN) {
                f.sum.resize(GGML_MAX_N_THREADS);
                f.den.resize(GGML_MAX_N_THREADS);
            }
        }
    }

    for (const auto & st : step) {
        const uint32_t n_unit = units_[st.seq].n_unit();

        if (needs.state || needs.given) {
            clear_state(st);
        }
        if (needs.given) {
            take_to_come(st);
        }
        if (needs.drawn) {
            for (uint32_t unit = 0; unit < n_unit; ++unit) {
                const int32_t * pos = units_[st.seq].pos(unit);

                for (const uint32_t slot : st.slots) {
                    save_drawn(st.seq, unit, slot, pos[slot]);
                }
                if (!st.unit_slots.empty()) {
                    save_drawn(st.seq, unit, st.unit_slots[unit], pos[st.unit_slots[unit]]);
                }
            }
        }

        if (st.clear) {
            clear_sums(st.seq);
        }
    }
    set_weights_of_queries();

    const bool one = std::all_of(step.begin(), step.end(), [](const auto & st) { return st.ahead || (st.slots.size() + st.unit_slots.size() > 0 &&
            (st.slots.size() == 1 || !st.unit_slots.empty())); });

    if (on_device) {
        set_choice(one);
    }

    std::vector<int64_t> chunk;
    for (const auto & st : step) {
        chunk.insert(chunk.end(), st.rows.begin(), st.rows.end());
    }

    for (auto & [buft, d] : devices) {
        if (!one) {
            put(d, d.idx_chunk, chunk.data(), 0, chunk.size()*sizeof(int64_t));
            continue;
        }
        if (on_device) {
            continue;
        }

        auto & idx = d.idx_host;
        idx.resize((size_t) d.n_head*n_seq);

        for (size_t i = 0; i < layers.size(); ++i) {
            if (states[i]->buft != buft) {
                continue;
            }
            for (uint32_t j = 0; j < step.size(); ++j) {
                const auto & st = step[j];
                for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
                    idx[(size_t) lane(st.seq, where.pool ? j : 0)*d.n_head + states[i]->i_head + h] =
                        st.unit_rows.empty() ? st.rows[0] : st.unit_rows[unit_of(i, h)];
                }
            }
        }
        put(d, d.idx_head, idx.data(), 0, idx.size()*sizeof(int64_t));

        if (!d.idx_v) {
            continue;
        }

        auto & idx_v = d.idx_v_host;
        idx_v.resize((size_t) d.n_embd_v*n_seq);

        for (size_t i = 0; i < layers.size(); ++i) {
            const auto & l = *states[i];
            if (l.buft != buft || !layers[i].v) {
                continue;
            }

            const int64_t n_embd = layers[i].v->ne[0]/layers[i].n_head_kv;

            for (uint32_t j = 0; j < step.size(); ++j) {
                const uint32_t to_lane = lane(step[j].seq, where.pool ? j : 0);
                for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
                    const int64_t row = idx[(size_t) to_lane*d.n_head + l.i_head + h];

                    int64_t * to = idx_v.data() + (size_t) l.i_embd_v*n_seq + to_lane*layers[i].v->ne[0];
                    for (int64_t c = h*n_embd; c < (h + 1)*n_embd; ++c) {
                        to[c] = c*n_rows + row;
                    }
                }
            }
        }
        put(d, d.idx_v, idx_v.data(), 0, idx_v.size()*sizeof(int64_t));
    }
}

void llama_kv_scores::clear_sums(uint32_t seq) {
    if (where.pool) {
        edit(0, [&](size_t i, plane & pl, float * data) {
            if (&pl == &states[i]->weights) {
                where.pool->for_rows(seq, 0, n_rows, [&](uint32_t j0, uint32_t j1) {
                    for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
                        std::fill(data + h*n_rows + j0, data + h*n_rows + j1, 0.0f);
                    }
                });
            }
        });
        return;
    }

    for (auto & [buft, d] : devices) {
        const std::vector<uint8_t> zeros(d.planes->nb[2]);
        put(d, d.planes, zeros.data(), where.stream_of(seq)*zeros.size(), zeros.size());
    }
}

// a pool on a device: what a query counts, and by how much the sums of its sequence shrink
void llama_kv_scores::set_weights_of_queries() {
    const uint32_t n = step.empty() ? 0 : step[0].n;

    if (!where.pool || all_cpu || !needs.weights || !weighs_queries(n)) {
        return;
    }

    std::vector<float> counts;
    for (size_t i = 0; i < step.size(); ++i) {
        for (uint32_t t = 0; t < n; ++t) {
            counts.push_back(t < first_query(n) ? 0.0f : std::pow(needs.decay, (float) (n - 1 - t)));
        }
    }

    std::vector<float> shrinks(needs.decay != 1.0f ? n_rows : 0, 1.0f);
    for (size_t i = 0; i < step.size() && !shrinks.empty(); ++i) {
        where.pool->for_rows(step[i].seq, 0, n_rows, [&](uint32_t j0, uint32_t j1) {
            std::fill(shrinks.begin() + j0, shrinks.begin() + j1, std::pow(needs.decay, (float) n));
        });
    }

    for (auto & [buft, d] : devices) {
        if (d.is_cpu) {
            continue;
        }
        put(d, d.counts, counts.data(), 0, counts.size()*sizeof(float));
        if (!shrinks.empty()) {
            put(d, d.shrinks, shrinks.data(), 0, shrinks.size()*sizeof(float));
        }
    }
}

//
// between ubatches
//

void llama_kv_scores::clear() {
    for (auto & l : units_) {
        l.reset();
    }
    for (uint32_t seq = 0; seq < n_seq; ++seq) {
        forget_choice(seq);
    }
    for (auto & [buft, d] : devices) {
        if (needs.weights) {
            const std::vector<uint8_t> zeros(n_stream*d.planes->nb[2]);
            ggml_backend_tensor_set(d.planes, zeros.data(), 0, zeros.size());
        }
    }

    for (uint32_t seq = 0; seq < n_seq; ++seq) {
        forget_queries(seq, 0);
        forget_to_come(seq);
    }

    step.clear();
    found_.clear();
}

void llama_kv_scores::forget_queries(uint32_t seq, int32_t p0) {
    for (auto & pos : query_pos[seq]) {
        pos = pos >= p0 ? llama_kv_units::none : pos;
    }
    n_counted[seq] = p0 == 0 ? 0 : UINT32_MAX;
}

void llama_kv_scores::move(uint32_t seq, const llama_kv_units::moves & moves) {
    behind[seq] = {};

    edit(where.stream_of(seq), [&](size_t i, plane &, float * data) {
        for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
            float * row = data + (size_t) h*n_rows;

            for (const auto & m : moves[unit_of(i, h)]) {
                row[where.of(seq, m.dst)] = row[where.of(seq, m.src)];
            }
        }
    });

    for (size_t i = 0; i < layers.size(); ++i) {
        for (uint32_t h = 0; h < layers[i].n_head_kv && !kept_state.empty(); ++h) {
            float * row = kept_state[seq].data() + (size_t) (heads[i] + h)*n_slots;

            for (const auto & m : moves[unit_of(i, h)]) {
                row[m.dst] = row[m.src];
            }
        }
    }

    for (size_t unit = 0; unit < moves.size(); ++unit) {
        for (const auto & m : moves[unit]) {
            if (needs.drawn) {
                drawn[seq][unit*n_slots + m.dst] = drawn[seq][unit*n_slots + m.src];
            }
            if (needs.k_unrotated) {
                stands[seq][unit*n_slots + m.dst] = stands[seq][unit*n_slots + m.src];
            }
        }
    }
}

void llama_kv_scores::copy(uint32_t src, uint32_t dst) {
    units_ [dst] = units_ [src];
    choices[dst] = choices[src];
    behind [dst] = {};

    if (needs.drawn) {
        drawn[dst] = drawn[src];
    }
    if (!kept_state.empty()) {
        kept_state[dst] = kept_state[src];
    }
    if (needs.given) {
        to_come[dst] = to_come[src];
    }
    if (needs.k_unrotated) {
        stands[dst] = stands[src];
    }
    query_pos[dst] = query_pos[src];
    n_counted[dst] = n_counted[src];

    const uint32_t strm_src = where.stream_of(src);
    const uint32_t strm_dst = where.stream_of(dst);

    std::vector<uint8_t> tmp;

    for (const auto & l : states) {
        if (l->queries) {
            tmp.resize(l->queries->nb[2]);
            ggml_backend_tensor_get(l->queries, tmp.data(), src*l->queries->nb[2], tmp.size());
            ggml_backend_tensor_set(l->queries, tmp.data(), dst*l->queries->nb[2], tmp.size());
        }
    }

    if (where.pool) {
        edit(strm_dst, [&](size_t i, plane &, float * data) {
            for (uint32_t slot = 0; slot < n_slots; ++slot) {
                if (units_[src].pos(0)[slot] == llama_kv_units::none) {
                    continue;
                }
                for (uint32_t h = 0; h < layers[i].n_head_kv; ++h) {
                    data[h*n_rows + where.of(dst, slot)] = data[h*n_rows + where.of(src, slot)];
                }
            }
        });
        return;
    }

    for (auto & [buft, d] : devices) {
        for (uint32_t k = 0; k < d.n_kind; ++k) {
            tmp.resize(d.planes->nb[2]);
            ggml_backend_tensor_get(d.planes, tmp.data(), (k*n_stream + strm_src)*tmp.size(), tmp.size());
            ggml_backend_tensor_set(d.planes, tmp.data(), (k*n_stream + strm_dst)*tmp.size(), tmp.size());
        }
    }
}
