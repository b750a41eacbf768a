// The body of portable.cpp, avx2.cpp, avx512.cpp and avx512_bf16.cpp: all kernels, compiled for the set SPARING_SET.
#include "attention.hpp"
#include "code_parts.hpp"
#include "coded_rows.hpp"
#include "codes.hpp"
#include "compressor.hpp"
#include "copy.hpp"
#include "elementwise.hpp"
#include "experts.hpp"
#include "hyper_connections.hpp"
#include "indexer.hpp"
#include "many_rows.hpp"
#include "packed_experts.hpp"
#include "released_entries.hpp"
#include "routing.hpp"
#include "sparse_attention.hpp"
#include "ssm.hpp"
#include "stage.hpp"
#include "unpack.hpp"

#define SPARING_TEXT(name) SPARING_TEXT_(name)
#define SPARING_TEXT_(name) #name

const sparing::Kernels sparing::SPARING_SET = {
    SPARING_TEXT(SPARING_SET), product, packed, unpack, finite_blocks, attention, stage, pool, select_entries,
    joint_attention, norm, rotation, residual, hyper_pre, hyper_post, encode_entries, decode_entries, encode_keys,
    decode_keys, codes, code_parts, coded_rows, convolution, scan, scan_rows, gated_norm, route, experts, packed_experts,
    copy,
};
