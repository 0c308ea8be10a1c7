#include "llama-kv-state-rows.h"

#include "ggml-backend.h"

// runs of neighbouring slots: f(index of the first one, slot, how many)
template <typename F>
static void for_runs(const std::vector<uint32_t> & slots, F && f) {
    for (size_t i = 0; i < slots.size();) {
        size_t n = 1;
        while (i + n < slots.size() && slots[i + n] == slots[i] + n) {
            n++;
        }
        f(i, slots[i], n);
        i += n;
    }
}

void llama_kv_state_write_rows(llama_kv_state_writer & out, const ggml_tensor * t, size_t offs, const std::vector<uint32_t> & slots) {
    const size_t row = t->nb[1];

    uint8_t * to = out.room(slots.size()*row);

    for_runs(slots, [&](size_t i, uint32_t slot, size_t n) {
        if (to) {
            ggml_backend_tensor_get(t, to + i*row, offs + slot*row, n*row);
        }
    });
}

void llama_kv_state_read_rows(llama_kv_state_reader & in, ggml_tensor * t, size_t offs, const std::vector<uint32_t> & slots, bool is_check) {
    const size_t row = t->nb[1];

    const uint8_t * from = in.take(slots.size()*row);

    for_runs(slots, [&](size_t i, uint32_t slot, size_t n) {
        if (!is_check) {
            ggml_backend_tensor_set(t, from + i*row, offs + slot*row, n*row);
        }
    });
}

void llama_kv_state_write_cols(llama_kv_state_writer & out, const ggml_tensor * t, size_t offs, size_t n_lines, size_t n_slots, const std::vector<uint32_t> & slots) {
    const size_t size = ggml_type_size(t->type);

    uint8_t * to = out.room(n_lines*slots.size()*size);
    if (!to) {
        return;
    }

    std::vector<uint8_t> all(n_lines*n_slots*size);
    ggml_backend_tensor_get(t, all.data(), offs, all.size());

    for (size_t line = 0; line < n_lines; ++line) {
        for_runs(slots, [&](size_t i, uint32_t slot, size_t n) {
            memcpy(to + (line*slots.size() + i)*size, all.data() + (line*n_slots + slot)*size, n*size);
        });
    }
}

void llama_kv_state_read_cols(llama_kv_state_reader & in, ggml_tensor * t, size_t offs, size_t n_lines, size_t n_slots, const std::vector<uint32_t> & slots, bool is_check) {
    const size_t size = ggml_type_size(t->type);

    const uint8_t * from = in.take(n_lines*slots.size()*size);
    if (is_check) {
        return;
    }

    // other sequences may have columns there
    std::vector<uint8_t> all(n_lines*n_slots*size);
    ggml_backend_tensor_get(t, all.data(), offs, all.size());

    for (size_t line = 0; line < n_lines; ++line) {
        for_runs(slots, [&](size_t i, uint32_t slot, size_t n) {
            memcpy(all.data() + (line*n_slots + slot)*size, from + (line*slots.size() + i)*size, n*size);
        });
    }
    ggml_backend_tensor_set(t, all.data(), offs, all.size());
}
