#pragma once

#include "llama-kv-policy.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

// bytes of saved states: written into memory that the caller has, read with every length checked, and files that are old or new as a whole
// no dependency on ggml

// why a state was not saved, or not restored: one sentence, and what a program may decide by
struct llama_kv_state_error : std::runtime_error {
    llama_kv_state_error(llama_kv_state_status status, const std::string & sentence) : std::runtime_error(sentence), status(status) {}

    llama_kv_state_status status;
};

[[noreturn]] inline void llama_kv_state_corrupt(const char * what) {
    throw llama_kv_state_error(LLAMA_KV_STATE_CORRUPT, std::string("this state is damaged (") + what + "): read the text again");
}

// CRC-32 (the polynomial of zlib) of n bytes that follow those with checksum `crc`
uint32_t llama_kv_crc32(uint32_t crc, const uint8_t * data, size_t n);

class llama_kv_state_writer {
public:
    // dst: nullptr to count only
    llama_kv_state_writer(uint8_t * dst, size_t size) : dst(dst), size(size) {}

    // n bytes that the caller fills in; nullptr while bytes are counted
    uint8_t * room(size_t n) {
        if (dst && n > size - n_written) {
            throw llama_kv_state_error(LLAMA_KV_STATE_BUFFER, "the buffer of " + std::to_string(size) + " bytes is too small for this state");
        }
        uint8_t * res = dst ? dst + n_written : nullptr;
        n_written += n;
        return res;
    }

    void bytes(const void * src, size_t n) {
        uint8_t * to = room(n);
        if (to && n > 0) {
            memcpy(to, src, n);
        }
    }

    template <typename T>
    void num(T value) { bytes(&value, sizeof(value)); }

    template <typename T>
    void nums(const std::vector<T> & values) { bytes(values.data(), values.size()*sizeof(T)); }

    void text(const std::string & value) {
        num((uint32_t) value.size());
        bytes(value.data(), value.size());
    }

    size_t n_bytes() const { return n_written; }

private:
    uint8_t * dst;
    size_t    size;
    size_t    n_written = 0;
};

class llama_kv_state_reader {
public:
    llama_kv_state_reader(const uint8_t * src, size_t size) : src(src), size(size) {}

    const uint8_t * take(size_t n) {
        if (n > size - n_read) {
            throw llama_kv_state_error(LLAMA_KV_STATE_CORRUPT, "this state is truncated: read the text again");
        }
        const uint8_t * res = src + n_read;
        n_read += n;
        return res;
    }

    template <typename T>
    T num() {
        T res;
        memcpy(&res, take(sizeof(T)), sizeof(T));
        return res;
    }

    // no more memory than there are bytes
    template <typename T>
    std::vector<T> nums(size_t n) {
        if (n > n_left()/sizeof(T)) {
            take(SIZE_MAX - n_read); // does not fit
        }
        const uint8_t * from = take(n*sizeof(T));

        std::vector<T> res(n);
        if (n > 0) {
            memcpy(res.data(), from, n*sizeof(T));
        }
        return res;
    }

    std::string text() {
        const uint32_t n = num<uint32_t>();
        return { (const char *) take(n), n };
    }

    // 0 or 1, and nothing else: equal states have equal bytes
    bool flag() {
        const uint8_t res = num<uint8_t>();
        if (res > 1) {
            llama_kv_state_corrupt("a switch");
        }
        return res != 0;
    }

    size_t n_bytes() const { return n_read; }
    size_t n_left()  const { return size - n_read; }

private:
    const uint8_t * src;
    size_t          size;
    size_t          n_read = 0;
};

// write a file under a temporary name beside it, and give it its name when it is complete; throws llama_kv_state_error, and then
//   what was there before is still there; is_private: nobody but its owner may read it, else as before, or as any new file
void llama_kv_state_replace_file(const char * path, const std::vector<uint8_t> & data, bool is_private = false);

// throws llama_kv_state_error
std::vector<uint8_t> llama_kv_state_read_file(const char * path, size_t n_max = SIZE_MAX);
