// Runs the CUDA backend over its emulation beside the CPU backend, on sizes around every granule,
// without torch: under sanitizers, and in two orders of the threads, whose results must be the same
// bit for bit. `sanitized PART` prints what differs and ends with 1.
#include "sanitized.h"

#include <map>

int main(int count, char** arguments) {
  using namespace unicom;
  const std::map<std::string, void (*)()> parts = {
      {"loss", check_loss}, {"rows", check_rows}, {"search", check_search}, {"tiles", check_tiles}};
  const auto part = parts.find(count == 2 ? arguments[1] : "");
  if (part == parts.end()) {
    std::printf("usage: sanitized loss|rows|search|tiles\n");
    return 2;
  }
  part->second();
  std::printf(failed ? "FAILED\n" : "all the same\n");
  return failed ? 1 : 0;
}
