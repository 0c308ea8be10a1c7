#pragma once

#include <cstdint>

// - a sequence has a number, `seq`: what belongs to it alone is indexed by that, as its ledger, its kept sets and its frame
// - a stream is the part of the cache's tensors and cells that holds its rows, `strm`
// where scores or copies of keys are kept, each sequence has a stream of its own; what a pool does asks llama_kv_where
inline uint32_t llama_kv_stream_of(uint32_t seq) { return seq; }
