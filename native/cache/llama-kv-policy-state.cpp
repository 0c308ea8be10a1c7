#include "llama-kv-policy-impl.h"

#include "llama-context.h"
#include "llama-kv-state-rows.h"
#include "llama-kv-state.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

// the part of a saved state that belongs to one sequence of a bounded cache: which token sits where, its rows of K and V, and all that
//   decides which tokens go next and how keys are rotated. Evictions that a chunk owes stay owed: saving changes nothing

static std::string number(double x) {
    char buf[32];
    snprintf(buf, sizeof(buf), "%.9g", x);
    return buf;
}

std::string llama_kv_policy::state_settings() const {
    const auto & cparams = lctx->get_cparams();

    // the policy, but for what changes its speed alone
    auto plain = spec;
    plain.cpu_attn = plain.adapt_threads = -1;

    std::string res = "policy=" + llama_kv_policy_text(plain);
    std::replace(res.begin(), res.end(), ':', ',');

    const auto add = [&](const std::string & key, const std::string & value) { res += "," + key + "=" + value; };

    // the shapes
    add("n_stream", std::to_string(kv.n_stream));
    add("n_ubatch", std::to_string(cparams.n_ubatch));
    if (!layers.empty()) {
        add("type_k", ggml_type_name(layers[0].k->type));
        add("type_v", layers[0].v ? ggml_type_name(layers[0].v->type) : "none");
    }
    add("v_layout", kv.v_trans ? "transposed" : "rows"); // without flash attention, and with it
    add("rot_k", kv.attn_rot_k ? "1" : "0");
    add("rot_v", kv.attn_rot_v ? "1" : "0");
    if (kv_swa) {
        add("n_slots_swa", std::to_string(kv_swa->get_size()));
    }
    if (cparams.n_rs_seq > 0) {
        add("n_rs_seq", std::to_string(cparams.n_rs_seq));
    }

    // how keys are rotated, as far as that is not the model's
    add("rope_freq_base",   number(cparams.rope_freq_base));
    add("rope_freq_scale",  number(cparams.rope_freq_scale));
    add("yarn_ext_factor",  number(cparams.yarn_ext_factor));
    add("yarn_attn_factor", number(cparams.yarn_attn_factor));
    if (cparams.yarn_ext_factor != 0.0f) {
        add("yarn_beta_fast", number(cparams.yarn_beta_fast));
        add("yarn_beta_slow", number(cparams.yarn_beta_slow));
        add("yarn_orig_ctx",  std::to_string(cparams.n_ctx_orig_yarn));
    }
    if (!layers.empty() && kv.model.layers[layers[0].il].rope_long) {
        const bool is_long = kv.model.get_rope_factors(cparams, (int) layers[0].il) == kv.model.layers[layers[0].il].rope_long;
        add("rope_factors", is_long ? "long" : "short");
    }

    return res;
}

void llama_kv_policy::state_check_write(llama_seq_id seq_id) const {
    const uint32_t seq = (uint32_t) seq_id;

    const auto & c = conditions[seq];

    if (c.lost || c.poisoned || std::find(inflight.begin(), inflight.end(), seq) != inflight.end()) {
        throw llama_kv_state_error(LLAMA_KV_STATE_SEQUENCE, "sequence " + std::to_string(seq_id) + " cannot be saved: " +
                (c.poisoned ? "it is empty since its last state or step was refused" : "a step has failed half way") + ": clear it and read the text again");
    }
}

//
// cells and rows of a cache, bounded or not
//

void llama_kv_policy::state_write_rows(llama_kv_state_writer & out, const llama_kv_cache & c, uint32_t strm, const std::vector<uint32_t> & slots) {
    if (c.has_cell_ext()) {
        for (const uint32_t slot : slots) {
            const auto & ext = c.v_cells[strm].ext_get(slot);
            out.num(ext.x);
            out.num(ext.y);
            out.num(ext.tok);
        }
    }
    for (const auto & layer : c.layers) {
        llama_kv_state_write_rows(out, layer.k_stream[strm], 0, slots);
        const ggml_tensor * v = layer.v_stream[strm];
        if (v && c.v_trans) {
            llama_kv_state_write_cols(out, v, 0, v->ne[0], v->ne[1], slots);
        } else if (v) {
            llama_kv_state_write_rows(out, v, 0, slots);
        }
    }
}

// pos: of the tokens in the slots
void llama_kv_policy::state_read_rows(llama_kv_state_reader & in, llama_kv_cache & c, uint32_t strm, llama_seq_id seq_id, const std::vector<uint32_t> & slots,
        const std::vector<llama_pos> & pos, bool is_check) {
    auto & cells = c.v_cells[strm];

    std::vector<llama_kv_cell_ext> exts(slots.size());
    if (c.has_cell_ext()) {
        const int32_t n_vocab = (int32_t) c.model.vocab.n_tokens();

        for (auto & ext : exts) {
            ext.x   = in.num<llama_pos>();
            ext.y   = in.num<llama_pos>();
            ext.tok = in.num<llama_token>();
            if (ext.tok < LLAMA_TOKEN_NULL || ext.tok >= n_vocab) {
                llama_kv_state_corrupt("a token");
            }
        }
    }

    for (size_t i = 0; i < slots.size() && !is_check; ++i) {
        cells.pos_set(slots[i], pos[i]);
        cells.ext_set(slots[i], exts[i]);
        cells.seq_add(slots[i], seq_id);
    }

    for (const auto & layer : c.layers) {
        llama_kv_state_read_rows(in, layer.k_stream[strm], 0, slots, is_check);
        ggml_tensor * v = layer.v_stream[strm];
        if (v && c.v_trans) {
            llama_kv_state_read_cols(in, v, 0, v->ne[0], v->ne[1], slots, is_check);
        } else if (v) {
            llama_kv_state_read_rows(in, v, 0, slots, is_check);
        }
    }
}

static std::vector<uint32_t> sorted(std::vector<uint32_t> slots) {
    std::sort(slots.begin(), slots.end());
    return slots;
}

//
// one sequence
//

void llama_kv_policy::state_write(llama_kv_state_writer & out, llama_seq_id seq_id) const {
    const uint32_t seq  = (uint32_t) seq_id;
    const uint32_t strm = where.stream_of(seq);

    catch_up(seq, true);

    const auto im    = ledgers[seq].get_image();
    const auto slots = sorted(im.slots);

    out.num(im.n_protect);
    out.num(im.n_evicted);
    out.num(im.n_interior);
    out.num(im.pos_first);
    out.num(im.pos_last);
    out.num(im.evicted_max);
    out.num(im.evictor_max);
    out.num(im.pos_placed);
    if (is_pool()) {
        out.num(ledgers[seq].budget());
    }
    out.num((uint32_t) im.slots.size());
    out.nums(im.slots);
    out.nums(im.pos);

    if (im.pos_first != llama_kv_ledger::none) {
        if (positions) {
            positions->state_write(out, seq, im, slots);
        }
        if (gather) {
            out.num((uint8_t) unrotated[seq]);
            gather->state_write(out, strm, slots);
        }
        if (scores) {
            scores->state_write(out, seq, slots);
        }
        if (filter) {
            filter->state_write(out);
        }
        state_write_rows(out, kv, strm, where.of(seq, slots));
    }
    if (scores && scores->has_given()) {
        scores->state_write_to_come(out, seq);
    }

    if (kv_swa) {
        const auto & cells = kv_swa->v_cells[strm];

        std::vector<uint32_t> occupied;
        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (cells.seq_has(i, seq_id)) {
                occupied.push_back(i);
            }
        }

        out.num(kv_swa->v_heads[strm]); // decides where the next token goes
        out.num((uint32_t) occupied.size());
        out.nums(occupied);
        for (const uint32_t slot : occupied) {
            out.num(cells.pos_get(slot));
        }
        state_write_rows(out, *kv_swa, strm, occupied);
    }
}

uint32_t llama_kv_policy::state_read(llama_kv_state_reader & in, llama_seq_id seq_id, llama_kv_cache * swa, bool is_check, llama_pos & pos_last) {
    const uint32_t seq  = (uint32_t) seq_id;
    const uint32_t strm = where.stream_of(seq);

    auto & ledger = ledgers[seq];

    llama_kv_ledger::image im;

    im.n_protect   = in.num<uint32_t>();
    im.n_evicted   = in.num<int64_t>();
    im.n_interior  = in.num<int64_t>();
    im.pos_first   = in.num<int32_t>();
    im.pos_last    = in.num<int32_t>();
    im.evicted_max = in.num<int32_t>();
    im.evictor_max = in.num<int32_t>();
    im.pos_placed  = in.num<int32_t>();

    const uint32_t n_allotted = is_pool() ? in.num<uint32_t>() : 0;
    if (n_allotted > budget || (is_pool() && n_allotted != budget && n_allotted % llama_kv_pool::PAGE != 0)) {
        llama_kv_state_corrupt("the allotment");
    }

    const uint32_t n = in.num<uint32_t>();
    im.slots = in.nums<uint32_t>(n);
    im.pos   = in.nums<int32_t>(n);

    const uint32_t page = scores ? scores->page_size() : 0;

    // the ledger as it will be
    auto resized = ledger;
    if (is_pool() && n_allotted > 0) {
        resized.resize(n_allotted, spec.desc->takes_recent ? llama_kv_pool::n_recent(spec.n_recent(budget), n_allotted) : ledger.n_recent());
    }

    if (!resized.is_possible(im) || im.n_protect < (uint32_t) spec.sinks ||
            (page > 0 && (uint64_t) im.n_protect + resized.n_recent() + 2*page - 1 > resized.budget())) {
        llama_kv_state_corrupt("tokens and slots");
    }
    pos_last = im.pos_last;

    if (!is_check) {
        if (is_pool() && im.pos_first != llama_kv_ledger::none) {
            restore_room(seq, n_allotted, im.slots);
        }
        ledger.set_image(im);
        arrivals  [seq].clear();
        conditions[seq] = {};
    }

    if (im.pos_first != llama_kv_ledger::none) {
        const auto slots = sorted(im.slots);

        const bool is_ranks = positions && positions->state_read(in, seq, im, slots, is_check);

        if (gather) {
            const bool flag = in.flag();
            if (!is_check) {
                unrotated[seq] = flag;
            }
            gather->state_read(in, strm, slots, is_check);
        }
        if (scores) {
            scores->state_read(in, seq, im, resized.n_recent(), resized.budget(), slots, is_ranks && is_per_head() && !gather, is_check);
        }
        if (filter) {
            filter->state_read(in, is_check);
        }

        std::vector<llama_pos> pos(n);
        for (uint32_t i = 0; i < n; ++i) {
            pos[std::lower_bound(slots.begin(), slots.end(), im.slots[i]) - slots.begin()] = im.pos[i];
        }
        state_read_rows(in, kv, strm, seq_id, is_check ? std::vector<uint32_t>(slots.size()) : where.of(seq, slots), pos, is_check);
    }
    if (scores && scores->has_given()) {
        scores->state_read_to_come(in, seq, im.pos_last, is_check);
    }

    if (swa) {
        const uint32_t head = in.num<uint32_t>();
        const uint32_t m    = in.num<uint32_t>();

        auto       slots = in.nums<uint32_t>(m);
        const auto pos   = in.nums<llama_pos>(m);

        auto unique = pos;
        std::sort(unique.begin(), unique.end());

        bool ok = head <= swa->get_size() && std::adjacent_find(unique.begin(), unique.end()) == unique.end();
        for (uint32_t i = 0; i < m; ++i) {
            ok = ok && slots[i] < swa->get_size() && (i == 0 || slots[i] > slots[i - 1]) && pos[i] >= im.pos_first && pos[i] >= 0 && pos[i] <= im.pos_last;
        }
        if (!ok) {
            llama_kv_state_corrupt("the sliding window");
        }
        if (is_pool()) {
            // the others' windows stay where they are
            const auto & cells = swa->v_cells[strm];

            slots.clear();
            for (uint32_t i = 0; i < cells.size() && slots.size() < m; ++i) {
                if (cells.is_empty(i)) {
                    slots.push_back(i);
                }
            }
            if (!is_check && slots.size() < m) {
                throw std::runtime_error("there is no room for the sliding window of sequence " + std::to_string(seq_id));
            }
            slots.resize(m);
        } else if (!is_check) {
            swa->v_heads[strm] = head;
        }
        state_read_rows(in, *swa, strm, seq_id, slots, pos, is_check);
    }

    return im.n_protect;
}

void llama_kv_policy::state_reserve(uint32_t n_protect) {
    if (!prepare_layers()) {
        throw std::bad_alloc();
    }
    if (positions) {
        positions->state_reserve(n_protect);
    }
}
