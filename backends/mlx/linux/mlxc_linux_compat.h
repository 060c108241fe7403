// Force-included (-include) into every mlx-c translation unit on Linux.
// It changes nothing in mlx-c. Two gaps it closes:
//  1. mlx-c private/io.h uses std::format ("{}" only), which libstdc++ has from
//     GCC 13 on (Debian 12 ships GCC 12.2).
//  2. mlx-c's half.h declares float16_t/bfloat16_t (and with them
//     mlx_array_{item,data}_{float16,bfloat16}) only for arm64. mlx-rs needs
//     them on every target, so on x86-64 alias MLX's own 16-bit types.
#pragma once
#ifdef __cplusplus
#include <version>
#if __has_include(<format>)
#include <format>
#endif
#if !defined(__cpp_lib_format)
#include <sstream>
#include <string>
#include <string_view>
namespace std {
template <class... Args>
inline string format(string_view f, const Args&... args) {
  ostringstream out;
  auto put = [&](const auto& v) {
    auto p = f.find("{}");
    out << f.substr(0, p);
    f.remove_prefix(p == string_view::npos ? f.size() : p + 2);
    out << v;
  };
  (put(args), ...);
  out << f;
  return out.str();
}
} // namespace std
#endif
#if !defined(__aarch64__)
#include "mlx/types/half_types.h"
using float16_t = mlx::core::float16_t;
using bfloat16_t = mlx::core::bfloat16_t;
#define HAS_FLOAT16
#define HAS_BFLOAT16
#endif
#endif
