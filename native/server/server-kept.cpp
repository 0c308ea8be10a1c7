#include "server-kept.h"

#include "server-common.h"

#include "../cache/llama-kv-policy.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

void server_kept::begin(const llama_context * ctx, llama_seq_id id, size_t n_known) {
    read(ctx, id);
    this->n_known    = (int64_t) n_known;
    n_evicted_before = now.n_evicted;
}

void server_kept::read(const llama_context * ctx, llama_seq_id id) {
    now = llama_get_kept(ctx, id);
}

int64_t server_kept::n_reread(uint64_t n_cached) const {
    return std::max<int64_t>(0, n_known - (int64_t) n_cached);
}

int64_t server_kept::n_evicted(uint64_t n_cached) const {
    // a lane that keeps nothing of what it had was emptied, and counts from 0
    return now.n_evicted - (n_cached > 0 ? std::min(n_evicted_before, now.n_evicted) : 0);
}

void server_kept::add_timings_to(common_json & answer, const common_json & timings) const {
    if (is_bounded()) {
        answer["timings"] = timings;
    }
}

bool server_kept::is_bounded() const {
    return strcmp(now.policy, "none") != 0;
}

void server_kept::add_to(common_json & timings, uint64_t n_cached) const {
    if (!is_bounded()) {
        return;
    }

    timings["policy"]    = now.policy;
    timings["budget"]    = now.budget;
    timings["n_kept"]    = now.n_kept;
    timings["n_evicted"] = now.n_evicted;
    if (now.n_evicted_pool >= 0) {
        timings["n_evicted_pool"] = now.n_evicted_pool;
    }
    timings["n_reread"]  = n_reread(n_cached);
}

void server_kept_metrics::add(const llama_context * ctx, llama_seq_id id, server_kept kept, uint64_t n_cached) {
    kept.read(ctx, id);
    n_evicted += kept.n_evicted(n_cached);
    n_reread  += kept.n_reread(n_cached);
}

void server_kept_metrics::read(const llama_context * ctx, size_t n_lanes) {
    lanes.clear();
    for (size_t i = 0; i < n_lanes; ++i) {
        lanes.push_back(llama_get_kept(ctx, (llama_seq_id) i));
    }
}

std::string server_kept_metrics::text() const {
    std::string res;

    const auto head = [&res](const char * name, const char * type, const char * help) {
        res += string_format("# HELP llamacpp:%s %s\n# TYPE llamacpp:%s %s\n", name, help, name, type);
    };

    head("kv_tokens_evicted_total", "counter", "Tokens evicted from the caches of all lanes");
    res += string_format("llamacpp:kv_tokens_evicted_total %llu\n", (unsigned long long) n_evicted);
    head("prompt_tokens_reread_total", "counter", "Prompt tokens that a lane had read before and read again");
    res += string_format("llamacpp:prompt_tokens_reread_total %llu\n", (unsigned long long) n_reread);

    const auto gauge = [&](const char * name, const char * help, int64_t llama_kept::* field) {
        head(name, "gauge", help);
        for (size_t i = 0; i < lanes.size(); ++i) {
            res += string_format("llamacpp:%s{lane=\"%zu\",policy=\"%s\"} %lld\n", name, i, lanes[i].policy, (long long) (lanes[i].*field));
        }
    };

    if (!lanes.empty()) {
        gauge("kv_tokens_budget",  "Most tokens that a lane keeps",                        &llama_kept::budget);
        gauge("kv_tokens_kept",    "Tokens that a lane keeps",                             &llama_kept::n_kept);
        gauge("kv_tokens_evicted", "Tokens of a lane's text that can no longer be read",   &llama_kept::n_evicted);
    }

    return res;
}

static common_json kept_ranges(const llama_context * ctx, llama_seq_id id) {
    std::vector<llama_pos> pos  (llama_kv_policy_get_shares(ctx, id, nullptr, nullptr, 0));
    std::vector<float>     share(pos.size());

    llama_kv_policy_get_shares(ctx, id, pos.data(), share.data(), (int32_t) pos.size());

    common_json res = common_json::array();

    for (size_t i = 0, end = 0; i < pos.size(); i = end) {
        for (end = i + 1; end < pos.size() && pos[end] == pos[end - 1] + 1 && share[end] == share[i]; ++end) {
        }

        common_json range = common_json::array({ pos[i], pos[end - 1] + 1 });
        if (share[i] < 1.0f) {
            range.push_back(std::round(share[i]*1000.0)/1000.0);
        }
        res.push_back(std::move(range));
    }

    return res;
}

void server_kept_metrics::add_to(common_json & slot, const llama_context * ctx, llama_seq_id id, bool with_ranges) const {
    const llama_kept & now = lanes.at(id);

    slot["policy"]    = now.policy;
    slot["budget"]    = now.budget;
    slot["n_kept"]    = now.n_kept;
    slot["n_evicted"] = now.n_evicted;

    if (now.n_evicted_pool >= 0) {
        slot["n_evicted_pool"] = now.n_evicted_pool;
    }
    if (with_ranges) {
        slot["kept"] = kept_ranges(ctx, id);
    }
}

//
// the log of requests
//

namespace {

// a request, the answers of the model and the end of the request belong to one thread of the HTTP server
struct request_t {
    std::string method;
    std::string path;
    std::string client;
    int         status = 0;

    uint64_t n_answers   = 0;
    uint64_t n_read      = 0;
    uint64_t n_cached    = 0;
    uint64_t n_reread    = 0;
    uint64_t n_generated = 0;
    int64_t  n_kept      = 0;
    int64_t  n_evicted   = 0;
    double   ms          = 0.0;
};

thread_local request_t request;

}

bool server_request_log_on() {
    static const bool is_on = [] {
        const char * env = getenv("EQUIP_REQUEST_LOG");
        return env && *env;
    }();

    return is_on;
}

void server_request_log_answer(const server_kept & kept, uint64_t n_read, uint64_t n_cached, uint64_t n_generated, double ms) {
    request.n_answers   += 1;
    request.n_read      += n_read;
    request.n_cached    += n_cached;
    request.n_reread    += kept.n_reread(n_cached);
    request.n_generated += n_generated;
    request.n_kept      += kept.now.n_kept;
    request.n_evicted   += kept.now.n_evicted;
    request.ms           = std::max(request.ms, ms);
}

void server_request_log(const std::string & method, const std::string & path, const std::string & client, int status, bool is_stream) {
    request.method = method;
    request.path   = path;
    request.client = client;
    request.status = status;

    if (!is_stream) {
        server_request_log_end();
    }
}

void server_request_log_end() {
    const request_t done = std::move(request);

    request = {};
    if (!server_request_log_on() || done.status == 0) {
        return;
    }

    // the HTTP server does not catch what its log throws
    try {
        json line = {
            {"method", done.method},
            {"path",   done.path},
            {"client", done.client},
            {"status", done.status},
        };
        if (done.n_answers > 0) {
            line["n_read"]      = done.n_read;
            line["n_cached"]    = done.n_cached;
            line["n_reread"]    = done.n_reread;
            line["n_generated"] = done.n_generated;
            line["n_kept"]      = done.n_kept;
            line["n_evicted"]   = done.n_evicted;
            line["ms"]          = done.ms;
        }

        const std::string text = "equip-request " + safe_json_to_str(line) + "\n";

        fwrite(text.data(), 1, text.size(), stderr);
    } catch (const std::exception & err) {
        SRV_WRN("a request could not be logged: %s\n", err.what());
    }
}
