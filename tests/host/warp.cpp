// What the lanes of a warp do together: see runtime.h, and for warpgroups warpgroup.cpp.
#pragma GCC optimize("O3")

#include <cstring>

#include "block.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace hyperconv_host {
namespace {

void check_mask(unsigned mask, Site site) {
  if (mask == 0xffffffffu) return;
  block.thread->site = site;
  fail_at(*block.thread, "warp collective", "only the mask of all lanes is implemented");
}

// PTX ISA, ldmatrix: row l % 8 of matrix l / 8 is at the address of lane l; lane l gets elements 2t and
// 2t + 1 of row g, or of column g if transposed.
template <bool kTranspose>
void perform_ldmatrix(Thread* const (&lanes)[kWarp]) {
  uint16_t matrix[4][8][8];
  for (int l = 0; l < kWarp; ++l) {
    const void* row = lanes[l]->operands.first;
    const char* name = kTranspose ? "ldmatrix_x4_trans" : "ldmatrix_x4";
    check_shared(*lanes[l], name, row);
    check_landed(*lanes[l], name, row);
    std::memcpy(matrix[l / 8][l % 8], row, 16);
  }
  for (int l = 0; l < kWarp; ++l) {
    auto* d = static_cast<uint32_t*>(lanes[l]->operands.result);
    const int g = l / 4, t = l % 4;
    for (int m = 0; m < 4; ++m) {
      const uint32_t low = kTranspose ? matrix[m][2 * t][g] : matrix[m][g][2 * t];
      const uint32_t high = kTranspose ? matrix[m][2 * t + 1][g] : matrix[m][g][2 * t + 1];
      d[m] = high << 16 | low;
    }
  }
}

using Row = float __attribute__((vector_size(32)));  // of c or b: 8 columns

template <int kDepth>
void multiply(Thread* const (&lanes)[kWarp], const float (&a)[16][kDepth], const Row (&b)[kDepth]) {
  Row c[16];
  for (int l = 0; l < kWarp; ++l) {
    const auto* from = static_cast<const float*>(lanes[l]->operands.result);
    for (int i = 0; i < 4; ++i) c[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2] = from[i];
  }
  for (int row = 0; row < 16; ++row) {
    Row sum = c[row];
    for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k];
    c[row] = sum;
  }
  for (int l = 0; l < kWarp; ++l) {
    auto* to = static_cast<float*>(lanes[l]->operands.result);
    for (int i = 0; i < 4; ++i) to[i] = c[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
  }
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": two neighbours along k to a
// register, a's rows g and g + 8 first, then k + 8.
template <typename T, float (*kToFloat)(T)>
void perform_mma_16(Thread* const (&lanes)[kWarp]) {
  T a_numbers[16][16], b_numbers[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto* a_bits = static_cast<const uint32_t*>(lanes[l]->operands.first);
    const auto* b_bits = static_cast<const uint32_t*>(lanes[l]->operands.second);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&a_numbers[g + 8 * (i % 2)][2 * t + 8 * (i / 2)], a_bits + i, 4);
    }
    for (int i = 0; i < 2; ++i) {
      b_numbers[2 * t + 8 * i][g].bits = static_cast<uint16_t>(b_bits[i]);
      b_numbers[2 * t + 8 * i + 1][g].bits = static_cast<uint16_t>(b_bits[i] >> 16);
    }
  }
  float a[16][16];
  Row b[16];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) a[row][k] = kToFloat(a_numbers[row][k]);
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 8; ++n) b[k][n] = kToFloat(b_numbers[k][n]);
  }
  multiply<16>(lanes, a, b);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k8", .tf32. The low 13 bits of a register are ignored.
void perform_mma_tf32(Thread* const (&lanes)[kWarp]) {
  constexpr uint32_t kTf32 = ~0x1fffu;
  float a[16][8];
  Row b[8];
  for (int l = 0; l < kWarp; ++l) {
    const auto* a_bits = static_cast<const uint32_t*>(lanes[l]->operands.first);
    const auto* b_bits = static_cast<const uint32_t*>(lanes[l]->operands.second);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = float_of(a_bits[i] & kTf32);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = float_of(b_bits[i] & kTf32);
  }
  multiply<8>(lanes, a, b);
}

struct ShuffleOperands {
  uint32_t value;
  int operand, width;
};

// PTX ISA, shfl.sync: the source lane from the operand's low five bits; a lane whose source lies beyond
// its segment keeps its own value.
template <Shuffle kKind>
void perform_shuffle(Thread* const (&lanes)[kWarp]) {
  for (int l = 0; l < kWarp; ++l) {
    const auto& own = *static_cast<const ShuffleOperands*>(lanes[l]->operands.first);
    const int operand = own.operand & 31, segment = l & -own.width, last = segment + own.width - 1;
    int source = segment | (operand & (own.width - 1));
    if (kKind == Shuffle::kDown) source = l + operand;
    if (kKind == Shuffle::kXor) source = l ^ operand;
    if (source > last) source = l;
    *static_cast<uint32_t*>(lanes[l]->operands.result) =
        static_cast<const ShuffleOperands*>(lanes[source]->operands.first)->value;
  }
}

constexpr Collective kSyncWarp{
    "__syncwarp", [](Thread* const (&)[kWarp]) { warp_synchronized(*block.warp); }};
constexpr Collective kShuffles[] = {{"__shfl_sync", perform_shuffle<Shuffle::kIndex>},
                                    {"__shfl_down_sync", perform_shuffle<Shuffle::kDown>},
                                    {"__shfl_xor_sync", perform_shuffle<Shuffle::kXor>}};
constexpr Collective kMma[] = {
    {"mma_m16n8k16<__half>", perform_mma_16<__half, __half2float>},
    {"mma_m16n8k16<__nv_bfloat16>", perform_mma_16<__nv_bfloat16, __bfloat162float>},
    {"mma_m16n8k8_tf32", perform_mma_tf32}};
constexpr Collective kLdmatrix[] = {{"ldmatrix_x4", perform_ldmatrix<false>},
                                    {"ldmatrix_x4_trans", perform_ldmatrix<true>}};

}  // namespace

void warp_barrier(unsigned mask, Site site) {
  check_mask(mask, site);
  if (skipped(site)) return;
  collect(kSyncWarp, {}, site);
}

uint32_t shuffle(Shuffle kind, unsigned mask, uint32_t value, int operand, int width, Site site) {
  check_mask(mask, site);
  const Collective& collective = kShuffles[static_cast<int>(kind)];
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    block.thread->site = site;
    fail_at(*block.thread, collective.name, text("width ", width, " is not a power of two up to 32"));
  }
  const ShuffleOperands own{value, operand, width};
  uint32_t result;
  collect(collective, {&own, nullptr, &result}, site);
  return result;
}

void mma(Format format, float* c, const uint32_t* a, const uint32_t* b, Site site) {
  collect(kMma[static_cast<int>(format)], {a, b, c}, site);
}

void ldmatrix(bool transpose, uint32_t* d, const void* row, Site site) {
  collect(kLdmatrix[transpose], {row, nullptr, d}, site);
}

}  // namespace hyperconv_host
