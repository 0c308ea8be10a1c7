// the nodes of ggml-kv-score.h on CUDA: launches of the phases in ggml-kv-score-kernel.h
// on Hopper, where ggml's kernels begin before the one in front has ended (programmatic dependent launch): ours are launched without that
// attribute, so they wait for it, and let nobody begin early, so those behind them wait for all that they write

#include "ggml-cuda-kv-score.cuh"

#include "ggml-cuda/common.cuh"
#include "ggml-kv-score-kernel.h"

#include <algorithm>

// most parts that the keys of a head are divided into: each block joins them all
static constexpr int MAX_SPLIT = 32;

static __device__ void reduce(const kv_score_args & a, kv_score_shared & s, bool is_sum) {
    for (int n = KV_SCORE_THREADS/2; n > 0; n /= 2) {
        __syncthreads();
        kv_score_reduce(a, s, threadIdx.x, n, is_sum);
    }
    __syncthreads();
}

template <ggml_type TYPE, int G>
static __global__ void __launch_bounds__(KV_SCORE_THREADS) weights_of_parts(const kv_score_args a) {
    __shared__ kv_score_shared s;

    const int     tid   = threadIdx.x;
    const int     split = blockIdx.x;
    const int64_t i     = blockIdx.y;

    kv_score_read_queries(a, s, tid, i);
    __syncthreads();
    kv_score_logits<TYPE, G>(a, s, tid, i, split);
    reduce(a, s, false);
    kv_score_keep_most(a, s, tid);
    __syncthreads();
    kv_score_sum(a, s, tid, i, split);
    reduce(a, s, true);
    kv_score_write_part(a, s, tid, i, split);
}

static __global__ void __launch_bounds__(KV_SCORE_THREADS) add_weights(const kv_score_args a) {
    __shared__ kv_score_shared s;

    kv_score_join(a, s, threadIdx.x, blockIdx.y);
    __syncthreads();
    kv_score_add(a, s, threadIdx.x, blockIdx.y, blockIdx.x);
}

static __global__ void __launch_bounds__(KV_SCORE_THREADS) choose(const kv_choice_args a) {
    __shared__ kv_choice_shared s;

    kv_choice_scan(a, s, threadIdx.x, blockIdx.x, blockIdx.y);
    for (int n = KV_SCORE_THREADS/2; n > 0; n /= 2) {
        __syncthreads();
        kv_choice_reduce(s, threadIdx.x, n);
    }
    kv_choice_write(a, s, threadIdx.x, blockIdx.x, blockIdx.y); // by the thread that has made the last step
}

template <ggml_type TYPE>
static void launch_parts(const kv_score_args & a, dim3 grid, cudaStream_t stream) {
    if (a.group == 1) {
        weights_of_parts<TYPE, 1><<<grid, KV_SCORE_THREADS, 0, stream>>>(a);
    } else if (a.group == 2) {
        weights_of_parts<TYPE, 2><<<grid, KV_SCORE_THREADS, 0, stream>>>(a);
    } else if (a.group <= 4) {
        weights_of_parts<TYPE, 4><<<grid, KV_SCORE_THREADS, 0, stream>>>(a);
    } else {
        weights_of_parts<TYPE, GGML_KV_SCORE_GROUP><<<grid, KV_SCORE_THREADS, 0, stream>>>(a);
    }
}

static void add_weights_of(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    kv_score_args a = kv_score_args_of(dst);

    const int64_t n_block = (int64_t) a.n_head_kv*a.n_layer*a.n_stream;

    // four blocks for each multiprocessor, if there is work for so many
    const int64_t n_most = (a.n_kv + KV_SCORE_THREADS - 1)/KV_SCORE_THREADS;
    const int64_t n_want = 4*ggml_cuda_info().devices[ctx.device].nsm/n_block;

    a.n_split = (int) std::max<int64_t>(1, std::min<int64_t>({ n_most, n_want, MAX_SPLIT }));
    a.n_each  = (n_most + a.n_split - 1)/a.n_split*KV_SCORE_THREADS;

    ggml_cuda_pool_alloc<float> logits(ctx.pool(), n_block*a.group*a.n_kv);
    ggml_cuda_pool_alloc<float> parts (ctx.pool(), n_block*a.group*a.n_split*2);
    a.logits = logits.get();
    a.parts  = parts.get();

    const dim3 grid(a.n_split, (unsigned) n_block);

    switch (a.type) {
        case GGML_TYPE_F32: launch_parts<GGML_TYPE_F32> (a, grid, ctx.stream()); break;
        case GGML_TYPE_F16: launch_parts<GGML_TYPE_F16> (a, grid, ctx.stream()); break;
        default:            launch_parts<GGML_TYPE_Q8_0>(a, grid, ctx.stream()); break;
    }
    add_weights<<<dim3((unsigned) n_most, (unsigned) n_block), KV_SCORE_THREADS, 0, ctx.stream()>>>(a);
}

bool ggml_cuda_kv_score_eligible(const ggml_tensor * node) {
    return ggml_kv_score_is(node) && kv_score_covers(node);
}

bool ggml_cuda_kv_score(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!ggml_cuda_kv_score_eligible(dst)) {
        return false;
    }

    if (dst->op_params[GGML_KV_SCORE_PARAM_KIND] == GGML_KV_SCORE_WEIGHTS) {
        add_weights_of(ctx, dst);
    } else {
        const kv_choice_args a = kv_choice_args_of(dst);
        choose<<<dim3(a.n_unit, (unsigned) (dst->ne[0]/a.n_unit)), KV_SCORE_THREADS, 0, ctx.stream()>>>(a);
    }
    CUDA_CHECK(cudaGetLastError());

    return true;
}
