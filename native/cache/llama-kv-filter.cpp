#include "llama-kv-filter.h"

#include "llama-kv-policy-impl.h"
#include "llama-kv-scores.h"
#include "llama-kv-state-io.h"

#include "ggml-cpu-attn.h"

#include <algorithm>
#include <cmath>

//
// llama_kv_filter_anchor
//

void llama_kv_filter_anchor::reset() {
    std::fill(k.begin(), k.end(), 0.0f);
    std::fill(v.begin(), v.end(), 0.0f);
    state = {};
}

void llama_kv_filter_anchor::copy(const llama_kv_filter_anchor & other) {
    std::copy(other.k.begin(), other.k.end(), k.begin());
    std::copy(other.v.begin(), other.v.end(), v.begin());
    state = other.state;
}

static void fade_into(std::vector<float> & anchor, uint32_t n_head, const char * cur, size_t nb) {
    const size_t n = anchor.size()/n_head;

    for (uint32_t h = 0; h < n_head; ++h) {
        const float * x = (const float *) (cur + h*nb);
        float       * a = anchor.data() + h*n;

        for (size_t c = 0; c < n; ++c) {
            a[c] = llama_kv_filter_anchor::MEMORY*a[c] + (1.0f - llama_kv_filter_anchor::MEMORY)*x[c];
        }
    }
}

void llama_kv_filter_anchor::add(const char * k_cur, size_t nb_k, const char * v_cur, size_t nb_v) {
    fade_into(k, n_head, k_cur, nb_k);
    fade_into(v, n_head, v_cur, nb_v);
    state.n_added = 1;
}

// of the heads' cosines
struct moments { double mean; double variance; };

static moments cosines(const std::vector<float> & anchor, uint32_t n_head, const char * cur, size_t nb) {
    const uint32_t n = (uint32_t) (anchor.size()/n_head);

    double sum  = 0.0;
    double sum2 = 0.0;

    for (uint32_t h = 0; h < n_head; ++h) {
        const float * x = (const float *) (cur + h*nb);
        const float * a = anchor.data() + (size_t) h*n;

        const double norm = std::sqrt((double) llama_kv_dot(x, x, n)*llama_kv_dot(a, a, n));
        const double cos  = norm > 0.0 ? llama_kv_dot(x, a, n)/norm : 0.0;

        sum  += cos;
        sum2 += cos*cos;
    }
    const double mean = sum/n_head;

    return { mean, std::max(0.0, sum2/n_head - mean*mean) };
}

double llama_kv_filter_anchor::similarity(const char * k_cur, size_t nb_k, const char * v_cur, size_t nb_v) const {
    const auto of_k = cosines(k, n_head, k_cur, nb_k);
    const auto of_v = cosines(v, n_head, v_cur, nb_v);

    // weights by the inverse of the variance: the one on which the heads agree counts more; one head agrees with itself
    const double both   = of_k.variance + of_v.variance;
    const double weight = both > 0.0 ? of_v.variance/both : 0.5;

    return weight*of_k.mean + (1.0 - weight)*of_v.mean;
}

bool llama_kv_filter_anchor::judge(double similarity, double ratio) {
    // nothing to compare with, or a number that is none
    if (state.n_added == 0 || !(similarity >= -2.0 && similarity <= 2.0)) {
        return false;
    }
    if (state.n_judged == 0) {
        state.mean = state.threshold = similarity;
    }

    const bool is_alike = state.n_judged > 0 && similarity >= state.threshold;

    state.n_judged += state.n_judged < UINT32_MAX;

    // the mean of all at first, and of the last ones then
    const double share = std::max(FADE, 1.0/state.n_judged);
    state.distance += share*(std::fabs(similarity - state.mean) - state.distance);
    state.mean     += share*(similarity - state.mean);

    // stands still where `ratio` of the tokens are alike, whatever their distribution
    state.threshold += STEP*state.distance*((is_alike ? 1.0 : 0.0) - ratio);

    return is_alike;
}

llama_kv_filter_anchor::weights llama_kv_filter_anchor::next() const {
    if (state.n_added == 0) {
        return { 0.0f, 1.0f, 0.0f, 0.0f };
    }
    const float share = (float) std::max(FADE, 1.0/((double) state.n_judged + 1.0));

    // the first one gives mean and threshold, which are 0
    return state.n_judged == 0 ? weights { 1.0f, 0.0f, 0.0f, 1.0f } : weights { share, 1.0f - share, share, 0.0f };
}

void llama_kv_filter_anchor::count(bool is_single) {
    state.n_judged += is_single && state.n_added > 0 && state.n_judged < UINT32_MAX;
    state.n_added   = 1;
}

void llama_kv_filter_anchor::set(const float * k_new, const float * v_new, const control & c) {
    std::copy_n(k_new, k.size(), k.begin());
    std::copy_n(v_new, v.size(), v.begin());
    state.mean      = c.mean;
    state.distance  = c.distance;
    state.threshold = c.threshold;
}

void llama_kv_filter_anchor::state_write(llama_kv_state_writer & out) const {
    out.nums(k);
    out.nums(v);
    out.num(state.n_added);
    out.num(state.n_judged);
    out.num(state.mean);
    out.num(state.distance);
    out.num(state.threshold);
}

void llama_kv_filter_anchor::state_read(llama_kv_state_reader & in, bool is_check) {
    auto k_in = in.nums<float>(k.size());
    auto v_in = in.nums<float>(v.size());

    auto s = state;
    s.n_added   = in.num<uint32_t>();
    s.n_judged  = in.num<uint32_t>();
    s.mean      = in.num<double>();
    s.distance  = in.num<double>();
    s.threshold = in.num<double>();

    if (s.n_added > 1 || s.n_judged > s.n_added*UINT32_MAX || !std::isfinite(s.mean) || !(s.distance >= 0.0 && s.distance <= 4.0) || !std::isfinite(s.threshold)) {
        llama_kv_state_corrupt("a filter");
    }
    if (!is_check) {
        k.swap(k_in);
        v.swap(v_in);
        state = s;
    }
}

//
// llama_kv_filter
//

llama_kv_filter::llama_kv_filter(const params & p, const std::vector<llama_kv_layer> & layers, const llama_kv_scores & scores) :
    p(p), scores(scores), layers(layers) {
    i_first = layers.size() - std::min<size_t>(p.n_layers, layers.size());

    for (size_t i = i_first; i < layers.size(); ++i) {
        const auto & l = layers[i];

        const llama_kv_filter_anchor anchor(l.n_head_kv, (uint32_t) l.k->ne[0]/l.n_head_kv, (uint32_t) l.v->ne[0]/l.n_head_kv);

        lanes.push_back({ anchor, anchor });

        auto & lane = lanes.back();
        lane.owner   = this;
        lane.i_layer = i;
        lane.n_head  = l.n_head_kv;
        lane.buft    = scores.is_on_cpu(i) ? nullptr : ggml_backend_buffer_get_type(l.k->buffer);
    }
    init_devices();
}

void llama_kv_filter::set_step(bool may, uint32_t n_tokens) {
    may_skip  = may;
    is_single = n_tokens == 1;
    for (auto & lane : lanes) {
        lane.is_skipped = false;
    }
    set_devices();
}

bool llama_kv_filter::may_be_skipped() const {
    return may_skip && std::any_of(lanes.begin(), lanes.end(), [&](const auto & lane) { return lane.anchor.n_judged() >= p.n_warmup; });
}

void llama_kv_filter::op_judge(ggml_tensor * dst, int ith, int nth, void * data) {
    GGML_UNUSED(nth);

    if (ith != 0) {
        return;
    }

    auto & lane = *(llama_kv_filter::lane *) data;
    auto & self = *lane.owner;

    const ggml_tensor * k = dst->src[0];
    const ggml_tensor * v = dst->src[1];

    const int64_t n = k->ne[2];

    auto & anchor = lane.next;
    anchor.copy(lane.anchor);

    for (int64_t t = 0; t < n; ++t) {
        const char * k_cur = (const char *) k->data + t*k->nb[2];
        const char * v_cur = (const char *) v->data + t*v->nb[2];

        if (n == 1) {
            const bool is_warm  = anchor.n_judged() >= self.p.n_warmup;
            const bool is_alike = anchor.judge(anchor.similarity(k_cur, k->nb[1], v_cur, v->nb[1]), self.p.ratio);

            lane.is_skipped = is_alike && is_warm && self.may_skip;
        }
        anchor.add(k_cur, k->nb[1], v_cur, v->nb[1]);
    }

    if (lane.is_skipped) {
        self.scores.divert(lane.i_layer);
    }

    *(float *) dst->data = lane.is_skipped ? 0.0f : 1.0f;
}

void llama_kv_filter::build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, ggml_tensor * v_cur, size_t i_layer) {
    if (!has(i_layer)) {
        return;
    }
    if (k_cur->type != GGML_TYPE_F32 || v_cur->type != GGML_TYPE_F32 || k_cur->nb[0] != sizeof(float) || v_cur->nb[0] != sizeof(float)) {
        llama_kv_policy_refuse("this model makes its keys or values in another form than filter reads: leave filter out");
    }

    auto & lane = lanes[i_layer - i_first];

    if (lane.buft) {
        build_there(ctx, gf, k_cur, v_cur, lane);
        return;
    }

    ggml_tensor * args[2] = { k_cur, v_cur };

    lane.node = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 2, op_judge, 1, &lane);

    ggml_build_forward_expand(gf, lane.node);
}

void llama_kv_filter::gate(ggml_context * ctx, ggml_cgraph * gf, size_t i_layer, ggml_tensor * kq, ggml_tensor * flash, bool is_ours) const {
    ggml_tensor * node = has(i_layer) ? lanes[i_layer - i_first].node : nullptr;

    if (node && lanes[i_layer - i_first].buft) {
        gate_there(ctx, kq ? kq : flash, node);
        return;
    }

    // a chunk is never left out
    if (!node || node->src[0]->ne[2] > 1) {
        return;
    }
    if (flash && is_ours) {
        ggml_cpu_attn_set_gate(flash, node);
    } else {
        // over what the next node reads
        ggml_build_forward_expand(gf, ggml_mul_inplace(ctx, flash ? flash : kq, node));
    }
}

void llama_kv_filter::commit() {
    for (auto & lane : lanes) {
        n_skip += lane.is_skipped;
        n_may  += may_skip && lane.anchor.n_judged() >= p.n_warmup;
        if (lane.buft) {
            lane.anchor.count(is_single);
        } else {
            lane.anchor.copy(lane.next);
        }
    }
    i_row = 1 - i_row;
}

void llama_kv_filter::reset() {
    for (auto & lane : lanes) {
        lane.anchor.reset();
        lane.next.reset();
        lane.is_skipped = false;
    }
    may_skip = false;
    is_stale = true;
    n_skip = 0;
    n_may  = 0;
}

void llama_kv_filter::state_write(llama_kv_state_writer & out) const {
    for (auto lane : lanes) {
        if (lane.buft && !is_stale) {
            fetch(lane);
        }
        lane.anchor.state_write(out);
    }
}

void llama_kv_filter::state_read(llama_kv_state_reader & in, bool is_check) {
    for (auto & lane : lanes) {
        lane.anchor.state_read(in, is_check);
        lane.next.copy(lane.anchor);
    }
    if (!is_check) {
        for (auto & lane : lanes) {
            lane.is_skipped = false;
        }
        may_skip = false;
        is_stale = true;
        n_skip = 0;
        n_may  = 0;
    }
}

//
// what the scores do for it
//

// the token of this step goes to no slot of the layer
void llama_kv_scores::divert(size_t i_layer) const {
    const auto & l = *states[i_layer];
    const auto & d = devices.at(l.buft);

    const int64_t row = row_never_read();

    std::fill_n((int64_t *) d.idx_head->data + l.i_head, layers[i_layer].n_head_kv, row);

    for (int64_t c = 0; d.idx_v && c < layers[i_layer].v->ne[0]; ++c) {
        ((int64_t *) d.idx_v->data)[l.i_embd_v + c] = c*n_rows + row;
    }
}

void llama_kv_scores::take_back_skipped() {
    if (!filter || step.size() != 1 || step[0].unit_slots.empty()) {
        return;
    }

    const auto & st = step[0];

    std::vector<bool> skipped(units_[st.seq].n_unit());
    for (size_t i = 0; i < layers.size(); ++i) {
        for (uint32_t h = 0; h < layers[i].n_head_kv && filter->is_skipped(i); ++h) {
            skipped[unit_of(i, h)] = true;
        }
    }
    units_[st.seq].undo_replace(st.unit_slots, skipped);

    for (uint32_t unit = 0; unit < skipped.size(); ++unit) {
        const uint32_t slot = st.unit_slots[unit];
        const int32_t  pos  = units_[st.seq].pos(unit)[slot];

        if (skipped[unit] && needs.drawn) {
            save_drawn(st.seq, unit, slot, pos);
        }
        if (skipped[unit] && needs.k_unrotated) {
            stands[st.seq][(size_t) unit*n_slots + slot] = pos; // with positions `true`
        }
    }
}
