#pragma once

// what llama-server tells of its lanes' caches: in timings, in /slots and /metrics, and in a line for each request

#include "../src/llama-ext.h"

#include "json.h"

#include <cstdint>
#include <string>
#include <vector>

// of one lane, for one request
struct server_kept {
    llama_kept now = { "none", 0, 0, 0, -1 };

    int64_t n_known          = 0; // tokens at the beginning of the prompt that the lane had read before
    int64_t n_evicted_before = 0;

    void begin(const llama_context * ctx, llama_seq_id id, size_t n_known);
    void read(const llama_context * ctx, llama_seq_id id);

    // tokens of the prompt that the lane had read before and read again, where it could keep n_cached of them
    int64_t n_reread(uint64_t n_cached) const;

    // since begin()
    int64_t n_evicted(uint64_t n_cached) const;

    // both do nothing without a policy, where answers are upstream's
    void add_to(common_json & timings, uint64_t n_cached) const;
    void add_timings_to(common_json & answer, const common_json & timings) const; // of an API that has none

    bool is_bounded() const;
};

// of all lanes, since the server was started
struct server_kept_metrics {
    uint64_t n_evicted = 0;
    uint64_t n_reread  = 0;

    std::vector<llama_kept> lanes;

    void add(const llama_context * ctx, llama_seq_id id, server_kept kept, uint64_t n_cached);
    // before each step: while one is computed, another thread tells of the lanes, and must not ask the context
    void read(const llama_context * ctx, size_t n_lanes);

    // /slots: the lane's fields; with_ranges: `kept` too, [[begin, end, share], ...] of the positions that are kept, where share, left
    // out if it is 1, is the share of the layers and heads that keep them; it asks the context
    void add_to(common_json & slot, const llama_context * ctx, llama_seq_id id, bool with_ranges) const;

    // in Prometheus' format
    std::string text() const;
};

// the log of requests: a line of JSON on stderr, after "equip-request ", for each answer; on where EQUIP_REQUEST_LOG is set
bool server_request_log_on();

// an answer of the request that this thread is at work on
void server_request_log_answer(const server_kept & kept, uint64_t n_read, uint64_t n_cached, uint64_t n_generated, double ms);

// the HTTP server's own log: the request is answered, or, if its answer is a stream, that begins now and ends with server_request_log_end()
void server_request_log(const std::string & method, const std::string & path, const std::string & client, int status, bool is_stream);
void server_request_log_end();
