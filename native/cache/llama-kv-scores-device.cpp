#include "llama-kv-scores.h"

#include "llama-impl.h"

#include "ggml-backend.h"
#include "llama-kv-score-node.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>

// victims that are chosen on the devices, by ggml's own operations: nothing is read back while a cache is full
//
// - the graph of one token first writes the token over `victims` (its key, its value, and in the planes its worth and birth), and
//   at its end, when all layers of the device have added their weights, chooses the next victims and keeps them in `history`
// - one graph for all steps: where the host decides (a cache that fills, what follows a chunk, a rewind or a saved state), it writes
//   `victims` before the step
// - what changes from token to token lies in `now`, which is written once per step
// - where a position is a rank in the unit, each slot's debt is counted too, by how many younger tokens have gone; every few tokens all keys
//   are rotated by it
// - with several devices each chooses for its own layers

static constexpr float UNIT = GGML_KV_SCORE_UNIT;
static constexpr float FAR  = GGML_KV_SCORE_FAR;
static constexpr float MOST = GGML_KV_SCORE_MOST;

// births are counted anew when they get inexact
static constexpr int32_t MAX_AGE = 1 << 23;

bool llama_kv_scores::may_choose() const {
    if (!as_product || n_kind_host() > 2 || where.pool || p.evict_every != 1 || p.eager || p.compact || p.filters ||
            needs.window > 0 || llama_kv_env_is("LLAMA_KV_CHOICE", "host")) {
        return false;
    }

    // heads of a unit that lie on several devices would have to be summed between them
    if (p.scope == LLAMA_KV_SCOPE_TOKEN && devices.size() > 1) {
        return false;
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        if (devices.at(states[i]->buft).is_cpu || (p.scope == LLAMA_KV_SCOPE_LAYER && layers[i].n_head_kv != layers[0].n_head_kv)) {
            return false;
        }
    }

    return true;
}

size_t llama_kv_scores::now_offset(now_part part) const {
    const size_t n = GGML_PAD(n_stream, 64);

    return part*n; // the parts in front have a number per stream
}

void llama_kv_scores::add_choice(device & d, ggml_context * ctx) const {
    d.n_per  = p.scope == LLAMA_KV_SCOPE_HEAD ? 1 : p.scope == LLAMA_KV_SCOPE_LAYER ? layers[0].n_head_kv : d.n_head;
    d.n_unit = d.n_head/d.n_per;

    d.victims = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, d.n_unit, n_stream);
    d.history = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, d.n_unit, (int64_t) N_BEHIND*n_stream);
    d.rows    = d.has_node && p.scope != LLAMA_KV_SCOPE_HEAD ? ggml_new_tensor_2d(ctx, GGML_TYPE_I64, d.n_unit, n_stream) : nullptr;

    d.now_host.resize(now_offset(NOW_FRESH) + (size_t) d.n_head*d.n_kind*n_stream);
    d.now = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, (int64_t) d.now_host.size());
    if (d.has_node && n_stream == 1 && !needs.drawn) {
        d.advance = ggml_dup_tensor(ctx, d.now);
    }
}

void llama_kv_scores::init_choice(device & d, ggml_context * ctx) const {
    d.now_row = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_stream);
    ggml_backend_tensor_alloc(d.buf.get(), d.now_row, d.now->data);

    if (d.advance) {
        auto & by = d.advance_host;
        by.resize(d.now_host.size());
        by[now_offset(NOW_ROW)]   = 1.0f;
        by[now_offset(NOW_CLOCK)] = UNIT;
        std::fill_n(&by[now_offset(NOW_FRESH) + kind_birth()*d.n_head], d.n_head, -UNIT);
        ggml_backend_tensor_set(d.advance, by.data(), 0, ggml_nbytes(d.advance));
    }
}

static bool is_supported(ggml_backend_buffer_type_t buft, ggml_cgraph * gf, const char * else_what) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        if (dev && !ggml_backend_dev_supports_op(dev, node)) {
            LLAMA_LOG_WARN("%s: %s has no %s as it is needed here, so %s\n", __func__, ggml_backend_dev_name(dev), ggml_op_desc(node), else_what);
            return false;
        }
    }

    return true;
}

// all of it by the device itself: the scheduler must not give part to another one
bool llama_kv_scores::can_choose(const device & d, ggml_backend_buffer_type_t buft) const {
    llama_kv_graph graph(n_nodes_choice(d));

    ggml_context * ctx = graph.get_ctx();

    begin_choice(ctx, graph.get(), d, 0, 1);
    build_choice(ctx, graph.get(), d, 0, 1);

    const auto & layer = layers[d.i_first];
    for (const ggml_tensor * t : { layer.k, layer.v }) {
        if (t) {
            ggml_tensor * cur = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, t->ne[0]/layer.n_head_kv, layer.n_head_kv, 1);
            graph.expand(build_rows(ctx, cur, d.i_first, 0, t == layer.v));
        }
    }

    return is_supported(buft, graph.get(), "the host chooses the tokens that go");
}

//
// the host
//

template <typename F>
void llama_kv_scores::for_units(ggml_backend_buffer_type_t buft, F && f) const {
    for (size_t i = 0; i < layers.size(); ++i) {
        if (states[i]->buft != buft || (p.scope == LLAMA_KV_SCOPE_TOKEN && i > 0)) {
            continue;
        }
        for (uint32_t h = 0; h < (p.scope == LLAMA_KV_SCOPE_HEAD ? layers[i].n_head_kv : 1); ++h) {
            f(states[i]->i_unit + h, unit_of(i, h));
        }
    }
}

float llama_kv_scores::draw(uint32_t unit, int32_t pos) {
    const uint64_t z = llama_kv_draw((uint64_t) pos + ((uint64_t) unit << 32));

    return (float) (z >> 40)/(1 << 24);
}

void llama_kv_scores::run_ahead(uint32_t seq) {
    choices[seq] = {};
    behind [seq].n++;
}

std::vector<std::vector<uint32_t>> llama_kv_scores::catch_up(uint32_t seq) {
    auto & b = behind[seq];

    const uint32_t n_rows_read = b.n + b.ready;
    const uint32_t n_unit      = units_[seq].n_unit();

    std::vector<std::vector<uint32_t>> res(n_rows_read, std::vector<uint32_t>(n_unit));

    std::vector<float> rows;

    for (auto & [buft, d] : devices) {
        rows.resize((size_t) n_rows_read*d.n_unit);
        ggml_backend_tensor_get(d.history, rows.data(), ((size_t) where.stream_of(seq)*N_BEHIND + b.row)*d.history->nb[1], rows.size()*sizeof(float));
        traffic.n_reads++;

        for_units(buft, [&, &d = d](uint32_t i, uint32_t unit) {
            for (uint32_t r = 0; r < n_rows_read; ++r) {
                res[r][unit] = (uint32_t) std::max(0.0f, rows[(size_t) r*d.n_unit + i]);
            }
        });
    }

    if (b.ready) {
        choices[seq].slots = std::move(res.back());
        choices[seq].n     = 1;
        choices[seq].i     = 0;
        res.pop_back();
    }
    b.row += b.n;
    b.n    = 0;

    return res;
}

bool llama_kv_scores::check_choice(uint32_t seq, const range & r) {
    if (!behind[seq].ready) {
        return true;
    }
    const choice theirs = choices[seq];

    const bool ok = choose(seq, 1, r, false) && choices[seq].slots == theirs.slots;

    choices[seq] = theirs;

    return ok;
}

void llama_kv_scores::arrive(uint32_t seq, const std::vector<uint32_t> & unit_slots) {
    for (uint32_t unit = 0; unit < unit_slots.size() && needs.drawn; ++unit) {
        save_drawn(seq, unit, unit_slots[unit], units_[seq].pos(unit)[unit_slots[unit]]);
    }
}

// the devices learn what lies in each slot
void llama_kv_scores::set_births(const seq_step & st) {
    const uint32_t strm = where.stream_of(st.seq);

    auto & b = behind[st.seq];

    b.origin = st.pos0;
    b.births = true;

    std::vector<float> births;
    std::vector<float> drawn_of;
    std::vector<float> debts_of;

    std::vector<int32_t> rotations;

    for (auto & [buft, d] : devices) {
        births.assign((size_t) n_rows*d.n_head, -FAR);
        drawn_of.assign(needs.drawn ? births.size() : 0, 0.0f);
        debts_of.assign(debts ? births.size() : 0, 0.0f);

        for_units(buft, [&, &d = d](uint32_t i, uint32_t unit) {
            const int32_t * pos = units_[st.seq].pos(unit);

            if (debts && is_per_head()) {
                units_[st.seq].debts(unit, st.next.pos_min, rotations);
            } else if (debts) {
                rotations = st.debts;
            }
            for (uint32_t j = i*d.n_per; j < (i + 1)*d.n_per; ++j) {
                for (uint32_t slot = 0; slot < n_slots; ++slot) {
                    const size_t to = (size_t) j*n_rows + slot;

                    // what this token went over is in the debts already: it must not be older than anything
                    if (pos[slot] != llama_kv_units::none && pos[slot] >= st.next.pos_min) {
                        births[to] = pos[slot] == st.pos0 ? FAR : -UNIT*(float) (pos[slot] - b.origin);
                    }
                    if (needs.drawn && pos[slot] != llama_kv_units::none) {
                        drawn_of[to] = drawn[st.seq][(size_t) unit*n_slots + slot];
                    }
                    if (debts) {
                        debts_of[to] = (float) rotations[slot];
                    }
                }
            }
        });

        const auto set = [&, &d = d](uint32_t k, const std::vector<float> & data) {
            put(d, d.planes, data.data(), (k*n_stream + strm)*d.planes->nb[2], data.size()*sizeof(float));
        };
        set(kind_birth(), births);
        if (needs.drawn) {
            set(0, drawn_of);
        }
        if (debts) {
            set(kind_debt(), debts_of);
        }
    }
}

bool llama_kv_scores::misses_births(const seq_step & st) const {
    const auto & b = behind[st.seq];

    return on_device && !st.ahead && (!b.births || st.pos0 - b.origin >= MAX_AGE);
}

// one: one token of each sequence
void llama_kv_scores::set_choice(bool one) {
    for (const auto & st : step) {
        auto & b = behind[st.seq];

        b.ready = false;
        if (!st.ahead) {
            b.row = 0;
            b.n   = 0;
        }
        if (!one || (!st.ahead && !st.want)) {
            b.births = false;
        } else if (misses_births(st)) {
            set_births(st);
        }
    }
    if (!one) {
        return;
    }

    std::vector<int32_t> victims;

    for (auto & [buft, d] : devices) {
        for (const auto & st : step) {
            const auto &   b    = behind[st.seq];
            const uint32_t strm = where.stream_of(st.seq);

            if (!st.ahead) {
                victims.resize(d.n_unit);
                for_units(buft, [&](uint32_t i, uint32_t unit) { victims[i] = (int32_t) (st.unit_rows.empty() ? st.rows[0] : st.unit_rows[unit]); });

                put(d, d.victims, victims.data(), strm*d.victims->nb[1], victims.size()*sizeof(int32_t));
                if (d.rows) {
                    const std::vector<int64_t> rows(victims.begin(), victims.end());
                    put(d, d.rows, rows.data(), strm*d.rows->nb[1], rows.size()*sizeof(int64_t));
                }
            }

            const int32_t row = (int32_t) (strm*N_BEHIND + b.row + b.n);
            if (d.has_node) {
                d.now_host[now_offset(NOW_ROW) + strm] = (float) row;
            } else {
                memcpy(&d.now_host[now_offset(NOW_ROW) + strm], &row, sizeof(row));
            }

            d.now_host[now_offset(NOW_CLOCK) + strm] = UNIT*(float) (st.next.pos_max - b.origin);

            float * fresh = &d.now_host[now_offset(NOW_FRESH) + (size_t) strm*d.n_kind*d.n_head];
            for_units(buft, [&, &d = d](uint32_t i, uint32_t unit) {
                std::fill_n(fresh + i*d.n_per,            d.n_per, needs.drawn ? draw(unit, st.pos0) : 0.0f);
                std::fill_n(fresh + kind_birth()*d.n_head + i*d.n_per, d.n_per, -UNIT*(float) (st.pos0 - b.origin));
            });
        }
        set_now(d);
    }
}

void llama_kv_scores::set_now(device & d) {
    if (!d.now_known || d.now_host != d.now_then) {
        put(d, d.now, d.now_host.data(), 0, d.now_host.size()*sizeof(float));
    }

    // (commit() says that the step was taken)
    d.now_known = false;
    if (d.advance) {
        d.now_then.resize(d.now_host.size());
        std::transform(d.now_host.begin(), d.now_host.end(), d.advance_host.begin(), d.now_then.begin(), std::plus<float>());
    }
}

//
// nodes
//

// f32 [n_rows, heads of a unit, n_unit]
ggml_tensor * llama_kv_scores::plane_of(ggml_context * ctx, const device & d, uint32_t kind, uint32_t strm) const {
    const size_t nb1 = d.planes->nb[1];

    return ggml_view_3d(ctx, d.planes, n_rows, d.n_per, d.n_unit, nb1, d.n_per*nb1, (kind*n_stream + strm)*d.planes->nb[2]);
}

// i32 [1, n_unit]
ggml_tensor * llama_kv_scores::victims_of(ggml_context * ctx, const device & d, uint32_t strm) const {
    return ggml_view_2d(ctx, d.victims, 1, d.n_unit, sizeof(int32_t), strm*d.victims->nb[1]);
}

// what is older than the victims stands one position too far
void llama_kv_scores::add_debts(ggml_context * ctx, ggml_cgraph * gf, const device & d, uint32_t strm) const {
    ggml_tensor * birth = plane_of(ctx, d, kind_birth(), strm);
    ggml_tensor * rows  = ggml_view_3d(ctx, birth, 1, n_rows, d.n_unit, sizeof(float), birth->nb[2], 0);
    ggml_tensor * gone  = ggml_get_rows(ctx, rows, victims_of(ctx, d, strm)); // [1, 1, n_unit]

    ggml_build_forward_expand(gf, ggml_add_inplace(ctx, plane_of(ctx, d, kind_debt(), strm), ggml_step(ctx, ggml_sub(ctx, birth, gone))));
}

// what is written back after a rotation by 0 may not be what was read
static bool is_rounded(const llama_kv_layer & layer, const llama_kv_rope & rope) {
    return ggml_is_quantized(layer.k->type) || !rope.is_exact(layer.il);
}

bool llama_kv_scores::has_debts(llama_kv_rope & rope) {
    if (debts && !debts_known) {
        debts_known = true;
        // (rows are counted in f32 there)
        debts = std::all_of(layers.begin(), layers.end(), [&](const auto & layer) {
            return !is_rounded(layer, rope) || (int64_t) n_rows*layer.n_head_kv < 1 << 24;
        });

        for (auto & [buft, d] : devices) {
            llama_kv_graph graph(n_nodes_rotation(d));
            build_rotation(graph, d, buft, 0, rope);
            debts = debts && is_supported(buft, graph.get(), "the host says by how much keys are rotated");
        }
    }

    return debts;
}

// all keys by what the victims have left them, those of the next token included; then nothing is left
void llama_kv_scores::build_rotation(llama_kv_graph & graph, const device & d, ggml_backend_buffer_type_t buft, uint32_t strm, llama_kv_rope & rope) const {
    ggml_context * ctx = graph.get_ctx();

    add_debts(ctx, graph.get(), d, strm);

    // the model's graph counts them once more: they must not be older than anything
    ggml_tensor * birth = plane_of(ctx, d, kind_birth(), strm);
    ggml_tensor * never = ggml_fill(ctx, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, 1, 1, d.n_per, d.n_unit), FAR);

    graph.expand(ggml_set_rows(ctx, ggml_view_4d(ctx, birth, 1, n_rows, d.n_per, d.n_unit, sizeof(float), birth->nb[1], birth->nb[2], 0), never,
                ggml_view_3d(ctx, d.victims, 1, 1, d.n_unit, sizeof(int32_t), sizeof(int32_t), strm*d.victims->nb[1])));

    // in the order of the keys: [n_head_kv, n_rows, n_layer]
    const int64_t n_head_kv = layers[d.i_first].n_head_kv;

    ggml_tensor * debt = plane_of(ctx, d, kind_debt(), strm);
    ggml_tensor * pos  = ggml_view_3d(ctx, debt, n_rows, n_head_kv, d.n_layer, d.planes->nb[1], n_head_kv*d.planes->nb[1], 0);

    ggml_tensor * by = ggml_cont(ctx, ggml_permute(ctx, pos, 1, 0, 2, 3));

    pos = ggml_cast(ctx, by, GGML_TYPE_I32);

    // where a row with a debt is, and where one without goes: to the last one, which nothing reads
    const int64_t n_key = n_head_kv*n_rows;

    ggml_tensor * rows = ggml_mul(ctx, ggml_step(ctx, ggml_reshape_2d(ctx, by, n_key, d.n_layer)), ggml_arange(ctx, 1.0f - n_key, 1.0f, 1.0f));

    rows = ggml_cast(ctx, ggml_scale_bias(ctx, rows, 1.0f, n_key - 1.0f), GGML_TYPE_I32);

    for (size_t i = 0; i < layers.size(); ++i) {
        if (states[i]->buft != buft || !rope.has(layers[i].il)) {
            continue;
        }
        ggml_tensor * k = layers[i].k_stream[strm];

        k = ggml_view_2d(ctx, k, k->ne[0]/n_head_kv, n_key, ggml_row_size(k->type, k->ne[0]/n_head_kv), 0);

        const auto of = [&](ggml_tensor * t) { return ggml_view_1d(ctx, t, n_key, states[i]->i_head/n_head_kv*n_key*sizeof(int32_t)); };

        if (is_rounded(layers[i], rope)) {
            ggml_tensor * cur = k->type == GGML_TYPE_F32 ? k : ggml_cast(ctx, k, GGML_TYPE_F32);

            graph.expand(ggml_set_rows(ctx, k, rope.build(ctx, cur, of(pos), layers[i].il, buft), of(rows)));
        } else {
            graph.expand(ggml_cpy(ctx, rope.build(ctx, k, of(pos), layers[i].il, buft), k));
        }
    }
    graph.expand(ggml_scale_inplace(ctx, debt, 0.0f));
}

bool llama_kv_scores::rotate_debts(uint32_t seq, llama_kv_rope & rope, llama_kv_backends & backends) {
    for (auto & [buft, d] : devices) {
        llama_kv_graph graph(n_nodes_rotation(d));
        build_rotation(graph, d, buft, where.stream_of(seq), rope);

        if (!graph.compute(backends, backends.get(d.buf.get()))) {
            return false;
        }
    }

    return true;
}

// the token's worth and birth, over those of its victims
void llama_kv_scores::begin_choice(ggml_context * ctx, ggml_cgraph * gf, const device & d, uint32_t s0, int64_t ns) const {
    const size_t nb1 = d.planes->nb[1];
    const size_t nb2 = d.planes->nb[2];

    for (int64_t strm = s0; strm < s0 + ns && debts; ++strm) {
        add_debts(ctx, gf, d, (uint32_t) strm);
    }

    // with one stream all kinds lie together
    const uint32_t n_kind = n_stream == 1 ? d.n_kind : 1;

    for (int64_t strm = s0; strm < s0 + ns; ++strm) {
        for (uint32_t k = 0; k < d.n_kind; k += n_kind) {
            ggml_tensor * dst = ggml_view_4d(ctx, d.planes, 1, n_rows, d.n_per, (int64_t) d.n_unit*n_kind, sizeof(float), nb1, d.n_per*nb1,
                    (k*n_stream + strm)*nb2);
            ggml_tensor * src = ggml_view_4d(ctx, d.now, 1, 1, d.n_per, (int64_t) d.n_unit*n_kind, sizeof(float), sizeof(float), d.n_per*sizeof(float),
                    (now_offset(NOW_FRESH) + (strm*d.n_kind + k)*d.n_head)*sizeof(float));
            ggml_tensor * idx = ggml_view_3d(ctx, d.victims, 1, 1, d.n_unit, sizeof(int32_t), sizeof(int32_t), strm*d.victims->nb[1]);

            ggml_build_forward_expand(gf, ggml_set_rows(ctx, dst, src, idx));
        }
    }
}

// the least worth of those that may go, and of equals the oldest
void llama_kv_scores::build_choice(ggml_context * ctx, ggml_cgraph * gf, const device & d, uint32_t s0, int64_t ns) const {
    const int64_t n_unit = d.n_unit;
    const int64_t n_all  = n_unit*ns;

    ggml_tensor * victims = ggml_view_1d(ctx, d.victims, n_all, s0*d.victims->nb[1]);

    if (d.has_node) {
        ggml_build_forward_expand(gf, llama_kv_score_choice_node(ctx, victims, { d.planes, d.now, d.history, d.rows, (int32_t) kind_birth(), as_product->is_negative() }, (int32_t) d.n_per, (int32_t) s0,
                    (int32_t) n_stream, (int32_t) now_offset(NOW_CLOCK)));
        if (d.advance) {
            ggml_build_forward_expand(gf, ggml_add_inplace(ctx, d.now, d.advance));
        }
        return;
    }

    const auto part = [&](uint32_t kind, uint32_t h) {
        return ggml_view_3d(ctx, d.planes, n_rows, n_unit, ns, d.n_per*d.planes->nb[1], d.planes->nb[2], (kind*n_stream + s0)*d.planes->nb[2] + h*d.planes->nb[1]);
    };
    const auto matrix = [&](ggml_tensor * t) { return ggml_reshape_2d(ctx, t, n_rows, n_all); };

    const auto worth_of = [&](uint32_t h) { return kind_birth() == 1 ? part(0, h) : ggml_mul(ctx, part(0, h), part(1, h)); };

    // in the order of the layers, as the host adds them up
    ggml_tensor * worth = worth_of(0);
    for (uint32_t h = 1; h < d.n_per; ++h) {
        worth = ggml_add(ctx, worth, worth_of(h));
    }
    ggml_tensor * birth = part(kind_birth(), 0);
    ggml_tensor * clock = ggml_view_3d(ctx, d.now, 1, 1, ns, sizeof(float), sizeof(float), (now_offset(NOW_CLOCK) + s0)*sizeof(float));

    // 0 for candidates, below it for all others
    ggml_tensor * late = ggml_clamp(ctx, ggml_add(ctx, birth, clock), -FLT_MAX, 0.0f);

    // (the clamp makes a number of anything, so that an index comes out whatever the model has computed)
    worth = ggml_clamp(ctx, worth, -MOST, MOST);

    ggml_tensor * x = matrix(as_product->is_negative() ? ggml_add(ctx, late, worth) : ggml_sub(ctx, late, worth));

    // which of equals an argmax takes differs between backends
    ggml_tensor * most  = ggml_get_rows(ctx, ggml_reshape_3d(ctx, x, 1, n_rows, n_all), ggml_reshape_2d(ctx, ggml_argmax(ctx, x), 1, n_all));
    ggml_tensor * below = ggml_sgn(ctx, ggml_sub(ctx, x, ggml_reshape_2d(ctx, most, 1, n_all))); // 0 for the equals, else -1
    ggml_tensor * ages  = ggml_add(ctx, ggml_reshape_3d(ctx, ggml_scale(ctx, below, FAR), n_rows, n_unit, ns), birth);
    ggml_tensor * best  = ggml_argmax(ctx, matrix(ages));

    ggml_build_forward_expand(gf, ggml_cpy(ctx, best, victims));

    ggml_tensor * row = ggml_reshape_2d(ctx, ggml_cast(ctx, best, GGML_TYPE_F32), n_unit, ns);

    ggml_build_forward_expand(gf, ggml_set_rows(ctx, d.history, row, ggml_view_1d(ctx, d.now_row, ns, s0*sizeof(int32_t))));
}
