// The products of warpgroups, and what moves matrices between registers. See asynchronous.h.
#pragma GCC optimize("O3")

#include <map>
#include <vector>

#include "asynchronous.h"
#include "block.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace hyperconv_host {
namespace {

constexpr int kGroupWarps = 4, kDepth = 16;

// Eight numbers of a right operand [k, n]: along n if it is transposed, else along k.
struct Piece {
  const unsigned char* bytes;
  int k, n;
};

// A warp's part in a wgmma: 16 rows of the 64.
struct Product {
  Format format;
  int width;
  bool transposed;  // the right operand
  float* d[kWarp];
  const uint32_t* a[kWarp];
  uint32_t issued[kWarp][4];  // a
  uint64_t b;
  std::vector<Piece> right;
  bool accumulate;
  Site site;
};

// What accumulators are while products are under way, which the lanes see as NaN.
struct Sums {
  std::vector<std::vector<float>> values;
  int pending;
};

struct Progress {
  std::vector<std::vector<Product>> groups;  // committed, oldest first
  std::vector<Product> open;
  std::map<const float*, Sums> sums;  // by lane 0's
  bool fenced;
  std::vector<uint64_t> history;  // of what the warps of a warpgroup must do alike
  int registers;
};

std::map<const Warp*, Progress> progress;

struct ProductOperands {
  Format format;
  int width;
  bool transposed;
  uint64_t b;
  bool accumulate;
};

constexpr uint32_t kPoison = 0xffffffffu;

template <typename T, float (*kToFloat)(T)>
float number_of(uint32_t bits) {
  T value;
  value.bits = static_cast<uint16_t>(bits);
  return kToFloat(value);
}
float to_float(Format format, uint32_t bits) {
  return format == Format::kHalf ? number_of<__half, __half2float>(bits & 0xffff)
                                 : number_of<__nv_bfloat16, __bfloat162float>(bits & 0xffff);
}

// PTX ISA, "Matrix descriptor": the start, and the leading and the stride offset, each without its last four
// bits; a base offset and the swizzle mode in bits 49 to 51 and 62 to 63.
//
// K-major without a swizzle, 8 numbers along k in 16 bytes, the next column 16 bytes on; eight columns on by the
// stride, eight numbers along k by the leading offset. N-major without one, 8 numbers along N in 16 bytes, the next
// row along k 16 bytes on; the offsets as before. N-major swizzled by 128 bytes, 8 numbers along N in 16
// bytes, eight such in a row, the next row along k 128 bytes on; eight rows on by the stride, 64 columns by the
// leading offset; the swizzle is of the address.
std::vector<Piece> right_of(const Thread& lane, const Product& product) {
  const uint64_t bits = product.b, mode = bits >> 62;
  const uint64_t known = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
  const bool is_swizzled = mode == 1;
  if ((bits & ~known) != 0 || mode > (product.transposed ? 1 : 0)) {
    fail_at(lane, "wgmma", "a descriptor with another swizzle, a base offset or reserved bits is not implemented");
  }
  const uint32_t start = (bits & 0x3fff) << 4, leading = (bits >> 16 & 0x3fff) << 4,
                 stride = (bits >> 32 & 0x3fff) << 4;
  if (is_swizzled && start % 1024 != 0) {
    fail_at(lane, "wgmma", "a swizzled right operand that does not begin at a multiple of 1024");
  }
  std::vector<Piece> pieces;
  const auto add = [&](uint32_t address, int k, int n) {
    const auto* bytes = static_cast<const unsigned char*>(shared_pointer(address));
    if (bytes < block.shared || bytes + 16 > block.shared + block.shared_bytes) {
      fail_at(lane, "wgmma", "the right operand reaches outside shared memory");
    }
    pieces.push_back({bytes, k, n});
  };
  if (product.transposed) {
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < product.width; n += 8) {
        if (!is_swizzled) {
          add(start + k / 8 * leading + n / 8 * stride + k % 8 * 16, k, n);
          continue;
        }
        const uint32_t address = start + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128;
        add(swizzled(address, CU_TENSOR_MAP_SWIZZLE_128B), k, n);
      }
    }
  } else {
    for (int k = 0; k < kDepth; k += 8) {
      for (int n = 0; n < product.width; ++n) add(start + k / 8 * leading + n / 8 * stride + n % 8 * 16, k, n);
    }
  }
  return pieces;
}

// Nobody may be writing to the right operand: neither when the product is issued nor when it reads.
void check_right(Thread* const (&lanes)[kWarp], const Product& product) {
  const unsigned char* last = nullptr;
  for (const Piece& piece : product.right) {
    check_fenced(*lanes[0], "wgmma", piece.bytes);
    if (last == nullptr || !brought_together(last, piece.bytes)) {
      for (Thread* lane : lanes) check_landed(*lane, "wgmma", piece.bytes);
    }
    last = piece.bytes;
  }
}

void read_right(const Product& product, std::vector<float>& b) {
  for (const Piece& piece : product.right) {
    uint16_t numbers[8];
    std::memcpy(numbers, piece.bytes, 16);
    for (int e = 0; e < 8; ++e) {
      const int k = piece.k + (product.transposed ? 0 : e), n = piece.n + (product.transposed ? e : 0);
      b[k * product.width + n] = to_float(product.format, numbers[e]);
    }
  }
}

// Lane l = 4 g + t of a warp has rows g and g + 8: of the left operand as in mma.m16n8k16, of the sums
// d[4 i] and d[4 i + 1] in columns 8 i + 2 t and the next one, d[4 i + 2] and d[4 i + 3] eight rows below.
void multiply(Thread* const (&lanes)[kWarp], const Product& product,
              std::vector<std::vector<float>>& values) {
  const int width = product.width;
  std::vector<float> b(kDepth * width), sum(width);
  check_right(lanes, product);
  read_right(product, b);
  float a[16][kDepth];
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t now = product.a[l][i];
      if (now != product.issued[l][i]) {
        fail_at(*lanes[l], "wgmma", text("its left operand changed before it was waited for; issued at ",
                                         describe(product.site)));
      }
      for (int e = 0; e < 2; ++e) {
        a[l / 4 + 8 * (i % 2)][2 * (l % 4) + 8 * (i / 2) + e] = to_float(product.format, now >> 16 * e);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    const auto place = [&](int n) -> float& {
      return values[row % 8 * 4 + n % 8 / 2][4 * (n / 8) + 2 * (row / 8) + n % 2];
    };
    for (int n = 0; n < width; ++n) sum[n] = product.accumulate ? place(n) : 0.0f;
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < width; ++n) sum[n] += a[row][k] * b[k * width + n];
    }
    for (int n = 0; n < width; ++n) place(n) = sum[n];
  }
}

void poison(float* d, int count) {
  for (int i = 0; i < count; ++i) std::memcpy(d + i, &kPoison, 4);
}

void finish(Thread* const (&lanes)[kWarp], Progress& own, const Product& product) {
  Sums& sums = own.sums.at(product.d[0]);
  multiply(lanes, product, sums.values);
  if (--sums.pending != 0) return;
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < product.width / 2; ++i) {
      if (std::memcmp(product.d[l] + i, &kPoison, 4) != 0) {
        fail_at(*lanes[l], "wgmma", text("an accumulator was written to before it was waited for; issued at ",
                                         describe(product.site)));
      }
    }
    std::memcpy(product.d[l], sums.values[l].data(), product.width / 2 * sizeof(float));
  }
  own.sums.erase(product.d[0]);
}

void perform_wgmma(Thread* const (&lanes)[kWarp]) {
  Progress& own = progress[block.warp];
  const auto& operands = *static_cast<const ProductOperands*>(lanes[0]->operands.second);
  Product product = {operands.format, operands.width, operands.transposed, {}, {}, {}, operands.b,
                     {}, operands.accumulate, lanes[0]->site};
  for (int l = 0; l < kWarp; ++l) {
    const auto& other = *static_cast<const ProductOperands*>(lanes[l]->operands.second);
    if (other.b != operands.b || other.accumulate != operands.accumulate) {
      fail_at(*lanes[l], "wgmma", "lanes disagree on the descriptor or on whether to add");
    }
    product.d[l] = static_cast<float*>(lanes[l]->operands.result);
    product.a[l] = static_cast<const uint32_t*>(lanes[l]->operands.first);
    std::memcpy(product.issued[l], product.a[l], sizeof product.issued[l]);
  }
  product.right = right_of(*lanes[0], product);
  check_right(lanes, product);
  if (!own.fenced) fail_at(*lanes[0], "wgmma", "no wgmma_fence() since the last wgmma_commit()");
  own.history.insert(own.history.end(), {operands.b, operands.accumulate, uint64_t(operands.width)});
  const auto [found, fresh] = own.sums.try_emplace(product.d[0]);
  if (fresh) {
    for (int l = 0; l < kWarp; ++l) {
      found->second.values.emplace_back(product.d[l], product.d[l] + product.width / 2);
    }
  }
  ++found->second.pending;
  if (eager) {  // done now, though the sums may be read only later
    multiply(lanes, product, found->second.values);
    for (int l = 0; l < kWarp; ++l) {
      std::memcpy(product.d[l], found->second.values[l].data(), product.width / 2 * sizeof(float));
    }
    if (--found->second.pending == 0) own.sums.erase(found);
    own.open.push_back(product);
    return;
  }
  if (fresh) {
    for (int l = 0; l < kWarp; ++l) poison(product.d[l], product.width / 2);
  }
  own.open.push_back(product);
}

void perform_commit(Thread* const (&)[kWarp]) {
  Progress& own = progress[block.warp];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
  own.fenced = false;
  own.history.push_back(1);
}

void perform_wait(Thread* const (&lanes)[kWarp]) {
  Progress& own = progress[block.warp];
  const size_t pending = *static_cast<const int*>(lanes[0]->operands.first);
  while (own.groups.size() > pending) {
    if (!eager) {
      for (const Product& product : own.groups.front()) finish(lanes, own, product);
    }
    own.groups.erase(own.groups.begin());
  }
  own.history.push_back(2 + pending);
}

template <bool kTranspose>
void perform_stmatrix(Thread* const (&lanes)[kWarp]) {
  constexpr const char* kName = kTranspose ? "stmatrix_x4_trans" : "stmatrix_x4";
  for (int l = 0; l < kWarp; ++l) {
    auto* row = static_cast<unsigned char*>(lanes[l]->operands.result);
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0 || row < block.shared ||
        row + 16 > block.shared + block.shared_bytes) {
      fail_at(*lanes[l], kName, "a row misaligned or outside shared memory");
    }
    check_overwritable(*block.warp, *lanes[l], kName, row);
    for (int i = 0; i < 8; ++i) {  // row l % 8 of matrix l / 8, or that column
      const int g = kTranspose ? i : l % 8, column = kTranspose ? l % 8 : i;
      const auto* s = static_cast<const uint32_t*>(lanes[4 * g + column / 2]->operands.first);
      const auto number = static_cast<uint16_t>(s[l / 8] >> 16 * (column % 2));
      std::memcpy(row + 2 * i, &number, 2);
    }
  }
}

void perform_movmatrix(Thread* const (&lanes)[kWarp]) {
  uint16_t matrix[8][8];
  for (int l = 0; l < kWarp; ++l) std::memcpy(&matrix[l / 4][l % 4 * 2], lanes[l]->operands.first, 4);
  for (int l = 0; l < kWarp; ++l) {
    const uint32_t low = matrix[l % 4 * 2][l / 4], high = matrix[l % 4 * 2 + 1][l / 4];
    *static_cast<uint32_t*>(lanes[l]->operands.result) = high << 16 | low;
  }
}

void perform_registers(Thread* const (&lanes)[kWarp]) {
  progress[block.warp].registers = *static_cast<const int*>(lanes[0]->operands.first);
}

constexpr Collective kFence{
    "wgmma_fence", [](Thread* const (&)[kWarp]) { progress[block.warp].fenced = true; }};
constexpr Collective kCommit{"wgmma_commit", perform_commit}, kWait{"wgmma_wait", perform_wait},
    kWgmma{"wgmma", perform_wgmma}, kStmatrix{"stmatrix_x4", perform_stmatrix<false>},
    kStmatrixTransposed{"stmatrix_x4_trans", perform_stmatrix<true>},
    kMovmatrix{"movmatrix_trans", perform_movmatrix}, kRegisters{"setmaxnreg", perform_registers};

}  // namespace

void begin_block_products() { progress.clear(); }

std::string unfinished_products() {
  const auto found = progress.find(block.warp);
  if (found == progress.end()) return "";
  const Progress& own = found->second;
  if (!own.open.empty()) return text(own.open.size(), " wgmma that it never committed");
  return own.groups.empty() ? "" : text(own.groups.size(), " groups of wgmma that it never waited for");
}

std::string unfinished_block_products() {
  for (size_t first = 0; first < block.warps.size(); first += kGroupWarps) {
    const Progress& one = progress[&block.warps[first]];
    for (size_t w = first; w < first + kGroupWarps && w < block.warps.size(); ++w) {
      const Progress& other = progress[&block.warps[w]];
      if (one.history != other.history) return text("warps ", first, " and ", w, " with other wgmma");
      if (one.registers != other.registers) return text("warps ", first, " and ", w, " with other registers");
    }
    if (!one.history.empty() && first + kGroupWarps > block.warps.size()) return "a partial warpgroup";
  }
  return "";
}

void stmatrix(bool transpose, void* row, const uint32_t* s, Site site) {
  collect(transpose ? kStmatrixTransposed : kStmatrix, {s, nullptr, row}, site);
}

uint32_t movmatrix(uint32_t pair, Site site) {
  uint32_t result;
  collect(kMovmatrix, {&pair, nullptr, &result}, site);
  return result;
}

// PTX ISA, setmaxnreg: 24 to 256, a multiple of 8, by all warps of a warpgroup.
void set_registers(bool, int count, Site site) {
  if (skipped(site)) return;
  if (count < 24 || count > 256 || count % 8 != 0) {
    block.thread->site = site;
    fail_at(*block.thread, "setmaxnreg", text(count, " registers"));
  }
  collect(kRegisters, {&count, nullptr, nullptr}, site);
}

void wgmma_fence(Site site) {
  if (!skipped(site)) collect(kFence, {}, site);
}
void wgmma_commit(Site site) {
  if (!skipped(site)) collect(kCommit, {}, site);
}
void wgmma_wait(int pending, Site site) {
  if (!skipped(site)) collect(kWait, {&pending, nullptr, nullptr}, site);
}

void wgmma(Format format, int width, bool transposed, float* d, const uint32_t* a, uint64_t b, bool accumulate,
           Site site) {
  const ProductOperands operands = {format, width, transposed, b, accumulate};
  collect(kWgmma, {a, &operands, d}, site);
}

}  // namespace hyperconv_host
