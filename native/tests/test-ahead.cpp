// victims that devices choose, beside the same ones chosen by the host: two contexts of one model go through the same random steps, chunks,
// rewinds, copies, saved states and cancelled steps. Logits are equal to the bit, and so are kept sets and sums whenever both are asked; the next
// victims are those that the host chooses by the sums as they are read back
// usage: test-ahead MODEL.gguf [operations] [tolerance]     (LLAMA_KV_SCORES=graph: in host memory as on a device)
//   tolerance: for devices that round one operation in several ways, by what stands beside it; of the logits' range, and of the sums

#include "test-session.h"

#include <memory>
#include <random>

struct setting {
    const char * policy;
    int          n_seq;
    bool         fa;
    ggml_type    type;
};

static std::unique_ptr<session> make(llama_model * model, const setting & s, const char * who) {
    setenv("LLAMA_KV_CHOICE", who, 1);
    auto res = std::make_unique<session>(model, s.policy, 16, s.n_seq, s.fa, false, 4096*s.n_seq, s.type, s.type);
    unsetenv("LLAMA_KV_CHOICE");
    return res;
}

struct program {
    const setting s;

    std::unique_ptr<session> host;
    std::unique_ptr<session> device;

    double           tolerance;
    std::mt19937     rng;
    std::vector<int> pos; // [n_seq] of the next token

    program(llama_model * model, const setting & s, int seed, double tolerance) : s(s), host(make(model, s, "host")), device(make(model, s, "device")), tolerance(tolerance), rng(seed), pos(s.n_seq, 0) {}

    int below(int n) { return (int) (rng() % (uint32_t) n); }

    // n tokens of each of these sequences
    int decode(session & to, const std::vector<int> & seqs, int n, int at) {
        auto & b = to.batch;
        b.n_tokens = 0;
        for (const int seq : seqs) {
            for (int i = 0; i < n; ++i) {
                const int j = b.n_tokens++;
                b.token[j]     = to.text(pos[seq] + i, seq);
                b.pos[j]       = pos[seq] + i;
                b.n_seq_id[j]  = 1;
                b.seq_id[j][0] = seq;
                b.logits[j]    = i == n - 1;
            }
        }
        n_left = at;
        const int res = llama_decode(to.ctx, b);
        n_left = -1;
        return res;
    }

    void step(const std::vector<int> & seqs, int n, int at) {
        const int r0 = decode(*host,   seqs, n, at);
        const int r1 = decode(*device, seqs, n, at);

        CHECK(r0 == r1, "%s: %d and %d", s.policy, r0, r1);
        if (r0 != 0 || r1 != 0) {
            for (const int seq : seqs) {
                llama_memory_seq_rm(host->mem(),   seq, pos[seq], -1);
                llama_memory_seq_rm(device->mem(), seq, pos[seq], -1);
            }
            return;
        }
        for (size_t i = 0; i < seqs.size(); ++i) {
            const auto a = host->logits((int) (i*n + n - 1));
            const auto b = device->logits((int) (i*n + n - 1));
            CHECK(tolerance > 0.0 ? diff(a, b) < tolerance : a == b, "%s: logits at position %d of sequence %d differ by %g", s.policy, pos[seqs[i]] + n - 1, seqs[i], diff(a, b));
            pos[seqs[i]] += n;
        }
    }

    std::vector<int> some() {
        std::vector<int> res;
        for (int seq = 0; seq < s.n_seq; ++seq) {
            if (below(4) > 0) {
                res.push_back(seq);
            }
        }
        return res.empty() ? std::vector<int> { 0 } : res;
    }

    // everything that a caller can ask
    void compare(int seq) {
        CHECK(llama_memory_seq_pos_max(host->mem(), seq) == llama_memory_seq_pos_max(device->mem(), seq), "%s: newest of %d", s.policy, seq);
        CHECK(llama_memory_seq_pos_min(host->mem(), seq) == llama_memory_seq_pos_min(device->mem(), seq), "%s: can go back in %d", s.policy, seq);
        CHECK(llama_kv_policy_is_sound(host->ctx) && llama_kv_policy_is_sound(device->ctx), "%s: books", s.policy);

        const auto a = host->stats(seq);
        const auto b = device->stats(seq);
        CHECK(a.n_used == b.n_used && a.n_evicted == b.n_evicted && a.n_rotations == b.n_rotations, "%s: %d, %d kept, %lld, %lld gone", s.policy, a.n_used,
                b.n_used, (long long) a.n_evicted, (long long) b.n_evicted);
        CHECK(host->kept(seq) == device->kept(seq), "%s: kept set of %d", s.policy, seq);

        const int32_t n_layer = llama_model_n_layer(llama_get_model(host->ctx));
        for (int32_t il = 0; il < n_layer; ++il) {
            for (int32_t h = 0; ; ++h) {
                std::vector<llama_pos> p[2] = { std::vector<llama_pos>(256), std::vector<llama_pos>(256) };
                std::vector<float>     w[2] = { std::vector<float>(256), std::vector<float>(256) };

                const int32_t n0 = llama_kv_policy_get_head(host->ctx,   seq, il, h, p[0].data(), w[0].data(), 256);
                const int32_t n1 = llama_kv_policy_get_head(device->ctx, seq, il, h, p[1].data(), w[1].data(), 256);

                bool ok = n0 == n1 && p[0] == p[1];
                for (size_t i = 0; i < w[0].size(); ++i) {
                    ok = ok && (tolerance > 0.0 ? std::fabs(w[0][i] - w[1][i]) <= tolerance*std::max(1.0f, w[0][i]) : w[0][i] == w[1][i]);
                }
                CHECK(ok, "%s: layer %d, head %d of sequence %d", s.policy, il, h, seq);
                if (n0 < 0) {
                    break;
                }
            }
        }
    }

    void rewind(int seq) {
        const int n = 1 + below(6);
        if (pos[seq] <= n + 8) {
            return;
        }
        const bool r0 = llama_memory_seq_rm(host->mem(),   seq, pos[seq] - n, -1);
        const bool r1 = llama_memory_seq_rm(device->mem(), seq, pos[seq] - n, -1);
        CHECK(r0 == r1, "%s: rewind", s.policy);
        pos[seq] -= r0 ? n : 0;
    }

    // of one twin, into both: what is saved does not say who chooses
    void restore(int src, int dst) {
        session & from = below(2) ? *host : *device;

        std::vector<uint8_t> data(llama_state_seq_get_size(from.ctx, src));
        data.resize(llama_state_seq_get_data(from.ctx, data.data(), data.size(), src));

        for (session * to : { host.get(), device.get() }) {
            CHECK(llama_state_seq_set_data(to->ctx, data.data(), data.size(), dst) == data.size(), "%s: restore", s.policy);
        }
        pos[dst] = pos[src];
    }

    void run(int n) {
        for (int i = 0; i < n; ++i) {
            const int seq = below(s.n_seq);

            switch (below(24)) {
                case 0:  step({ seq }, 2 + below(30), -1); break;
                case 1:  rewind(seq); break;
                case 2:  compare(seq); break;
                case 3:  step({ seq }, 1, below(12)); break; // cancelled before the second layer
                case 4:  restore(seq, below(s.n_seq)); break;
                case 5: {
                    const int dst = below(s.n_seq);
                    if (dst != seq) {
                        for (session * to : { host.get(), device.get() }) {
                            llama_memory_seq_rm(to->mem(), dst, -1, -1);
                            llama_memory_seq_cp(to->mem(), seq, dst, -1, -1);
                        }
                        pos[dst] = pos[seq];
                    }
                    break;
                }
                case 6:
                    if (below(8) == 0) {
                        llama_memory_seq_rm(host->mem(),   seq, -1, -1);
                        llama_memory_seq_rm(device->mem(), seq, -1, -1);
                        pos[seq] = 0;
                    }
                    break;
                case 7:
                    device->kept(seq); // only one of them is asked
                    break;
                default: {
                    const auto seqs = some();
                    for (int j = 1 + below(90); j > 0 && n_fail == 0; --j) {
                        step(seqs, 1, -1);
                    }
                }
            }
            if (n_fail > 0) {
                fprintf(stderr, "%s, %d sequences, operation %d\n", s.policy, s.n_seq, i);
                return;
            }
        }
        for (int seq = 0; seq < s.n_seq; ++seq) {
            compare(seq);
        }
    }

    // what moves between host and device while the cache is full; the question itself reads once from each device
    void steady() {
        const std::vector<int> all = [&]() { std::vector<int> res; for (int q = 0; q < s.n_seq; ++q) { res.push_back(q); } return res; }();

        for (const int seq : all) {
            llama_memory_seq_rm(host->mem(),   seq, -1, -1);
            llama_memory_seq_rm(device->mem(), seq, -1, -1);
            pos[seq] = 0;
        }
        for (int i = 0; i < 80; ++i) {
            step(all, 1, -1);
        }
        const auto begun = device->stats(0);

        const int n = 20;
        for (int i = 0; i < n; ++i) {
            step(all, 1, -1);
        }
        const auto after = device->stats(0);

        n_read  = after.n_device_reads  - begun.n_device_reads;
        n_write = after.n_device_writes - begun.n_device_writes;
        n_token = n;
    }

    int64_t n_read = 0, n_write = 0, n_token = 0;
};

int main(int argc, char ** argv) {
    if (argc < 2) {
        die("usage: test-ahead MODEL.gguf [operations] [tolerance]");
    }
    const int    n_ops     = argc > 2 ? atoi(argv[2]) : 120;
    const double tolerance = argc > 3 ? atof(argv[3]) : 0.0;

    llama_model * model = load_model(argv[1]);

    const std::vector<setting> settings = {
        { "h2o:budget=48,recent=8,positions=true",                       1, false, GGML_TYPE_F32 },
        { "h2o:budget=48,recent=8,positions=true",                       3, true,  GGML_TYPE_F16 },
        { "h2o:budget=48,recent=8,positions=cache,rotate_every=5",       1, true,  GGML_TYPE_F16 },
        { "h2o:budget=48,recent=8,positions=auto,scope=layer",           2, false, GGML_TYPE_F16 },
        { "tova:budget=40,recent=8,positions=true,scope=head",           2, false, GGML_TYPE_F32 },
        { "tova:budget=40,recent=8,positions=cache,scope=token",         1, true,  GGML_TYPE_F16 },
        { "a2sf:budget=48,recent=9,positions=cache,scope=layer",         3, true,  GGML_TYPE_F16 },
        { "a2sf:budget=48,recent=9,positions=true,scope=token,decay=0.9", 2, false, GGML_TYPE_F16 },
        { "random:budget=48,recent=8,positions=true,scope=head",         2, false, GGML_TYPE_F32 },
        { "random:budget=48,recent=8,positions=cache,scope=layer,sinks=0", 1, true, GGML_TYPE_F16 },
        { "h2o:budget=48,recent=8,positions=cache,rotate_every=4",       1, false, GGML_TYPE_F32 },
        { "h2o:budget=48,recent=8,positions=cache,rotate_every=5",       1, true,  GGML_TYPE_Q8_0 },
        { "h2o:budget=48,recent=8,positions=cache,rotate_every=3",       1, true,  GGML_TYPE_IQ4_NL },
        { "a2sf:budget=48,recent=9,positions=auto,scope=layer,rotate_every=4", 2, true, GGML_TYPE_Q4_0 },
        { "h2o:budget=48,recent=8,positions=cache,scope=token,rotate_every=6", 2, true, GGML_TYPE_Q8_0 },
        { "vatp:budget=48,recent=8,positions=true",                      2, true,  GGML_TYPE_F16 },
        { "vatp:budget=48,recent=8,positions=cache,scope=layer,rotate_every=4", 1, false, GGML_TYPE_F16 },
        { "knorm:budget=48,recent=8,positions=cache,rotate_every=4",     1, true,  GGML_TYPE_F16 },
        { "knorm:budget=48,recent=8,positions=true,scope=layer",         2, false, GGML_TYPE_F32 },
    };

    for (size_t i = 0; i < settings.size(); ++i) {
        program p(model, settings[i], (int) i + 1, tolerance);
        CHECK(p.host->ctx && p.device->ctx, "%s: %s", settings[i].policy, llama_kv_policy_error());
        if (n_fail == 0) {
            p.run(n_ops);
        }
        if (n_fail == 0) {
            p.steady();
            printf("%s, %d sequences: %lld reads and %lld writes in %lld steps\n", settings[i].policy, settings[i].n_seq, (long long) p.n_read, (long long) p.n_write, (long long) p.n_token);
        }
    }
    llama_model_free(model);

    printf("%s\n", n_fail == 0 ? "OK" : "FAILED");

    return n_fail != 0;
}
