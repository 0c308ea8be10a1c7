#include "llama-kv-state-io.h"

#include "ggml.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>

#if defined(_WIN32)
#    include <io.h>
#    include <process.h>
#else
#    include <unistd.h>
#endif

// eight bytes at a time: table[k][b] is the checksum of the byte b and k zeros behind it
static std::array<std::array<uint32_t, 256>, 8> make_table() {
    std::array<std::array<uint32_t, 256>, 8> res;

    for (uint32_t b = 0; b < 256; ++b) {
        uint32_t crc = b;
        for (int i = 0; i < 8; ++i) {
            crc = crc & 1 ? (crc >> 1) ^ 0xedb88320u : crc >> 1;
        }
        res[0][b] = crc;
    }
    for (uint32_t b = 0; b < 256; ++b) {
        for (int k = 1; k < 8; ++k) {
            res[k][b] = (res[k - 1][b] >> 8) ^ res[0][res[k - 1][b] & 0xff];
        }
    }

    return res;
}

uint32_t llama_kv_crc32(uint32_t crc, const uint8_t * data, size_t n) {
    static const auto table = make_table();

    crc = ~crc;

    for (; n >= 8; n -= 8, data += 8) {
        const uint32_t a = crc ^ (data[0] | (uint32_t) data[1] << 8 | (uint32_t) data[2] << 16 | (uint32_t) data[3] << 24);

        crc = table[7][a & 0xff] ^ table[6][(a >> 8) & 0xff] ^ table[5][(a >> 16) & 0xff] ^ table[4][a >> 24] ^
              table[3][data[4]]  ^ table[2][data[5]]         ^ table[1][data[6]]          ^ table[0][data[7]];
    }
    for (; n > 0; --n, ++data) {
        crc = (crc >> 8) ^ table[0][(crc ^ *data) & 0xff];
    }

    return ~crc;
}

namespace fs = std::filesystem;

namespace {

struct open_file {
    FILE * f;

    open_file(const std::string & path, const char * mode) : f(ggml_fopen(path.c_str(), mode)) {}
    ~open_file() { close(); }

    open_file(const open_file &) = delete;
    open_file & operator=(const open_file &) = delete;

    bool close() {
        const bool ok = !f || fclose(f) == 0;
        f = nullptr;
        return ok;
    }

    // on the disk, and not only on its way there
    bool sync() {
        if (fflush(f) != 0) {
            return false;
        }
#if defined(_WIN32)
        return _commit(_fileno(f)) == 0;
#else
        return fsync(fileno(f)) == 0 || errno == EINVAL; // not every file system knows it
#endif
    }
};

}

[[noreturn]] static void fail_file(const std::string & what, const std::string & path) {
    throw llama_kv_state_error(LLAMA_KV_STATE_FILE, what + " " + path + ": " + (errno ? strerror(errno) : "unknown error"));
}

void llama_kv_state_replace_file(const char * path, const std::vector<uint8_t> & data, bool is_private) {
    static std::atomic<uint32_t> counter { 0 };

    errno = 0;

    std::error_code err;

    // a link stays one, and what is no plain file (a pipe, a device) has no name to be replaced
    fs::path target = fs::u8path(path);
    if (fs::is_symlink(target, err)) {
        const fs::path real = fs::weakly_canonical(target, err);
        target = err ? target : real;
    }
    const fs::file_status status   = fs::status(target, err);
    const bool            is_plain = !fs::exists(status) || fs::is_regular_file(status);

#if defined(_WIN32)
    const int pid = _getpid();
#else
    const int pid = getpid();
#endif
    const std::string name = target.u8string();
    const std::string tmp  = is_plain ? name + "." + std::to_string(pid) + "-" + std::to_string(counter++) + ".tmp" : name;

    const auto give_up = [&](const std::string & what) {
        const int why = errno;
        if (is_plain) {
            fs::remove(fs::u8path(tmp), err);
        }
        errno = why;
        fail_file(what, path);
    };

    {
        open_file file(tmp, "wb");
        if (!file.f) {
            fail_file("cannot write", path);
        }
        // before there is anything to read; what cannot be set stays the default
        if (is_plain && is_private) {
            fs::permissions(fs::u8path(tmp), fs::perms::owner_read | fs::perms::owner_write, err);
        } else if (is_plain && fs::exists(status)) {
            fs::permissions(fs::u8path(tmp), status.permissions(), err);
        }
        if (fwrite(data.data(), 1, data.size(), file.f) != data.size() || (is_plain && !file.sync()) || !file.close()) {
            file.close();
            give_up("cannot write");
        }
    }

    if (!is_plain) {
        return;
    }
    fs::rename(fs::u8path(tmp), target, err);
    if (err) {
        errno = err.value();
        give_up("cannot replace");
    }
}

std::vector<uint8_t> llama_kv_state_read_file(const char * path, size_t n_max) {
    errno = 0;

    open_file file(path, "rb");
    if (!file.f) {
        fail_file("cannot read", path);
    }

    // no more memory than there are bytes, whatever kind of file this is
    std::vector<uint8_t> res;
    for (size_t n = 0; n < n_max;) {
        const size_t n_want = std::min<size_t>(n_max - n, std::max<size_t>(n, 1 << 16));

        res.resize(n + n_want);
        const size_t n_got = fread(res.data() + n, 1, n_want, file.f);

        n += n_got;
        res.resize(n);
        if (n_got < n_want) {
            if (ferror(file.f)) {
                fail_file("cannot read", path);
            }
            break;
        }
    }

    return res;
}
