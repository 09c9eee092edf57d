"""cugemm.driver against a stub libcuda that records what it is given, and without any driver. No GPU needed."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import cugemm.driver
from cugemm.errors import CudaError

# `answers[i]` is the result of the i-th next cuLaunchKernelEx; contexts are 0x1000 + device; one current context per thread, as in CUDA.
STUB = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
typedef struct { uint32_t grid[3], block[3], smem; uint64_t stream; void *attrs; uint32_t num_attrs; } Config;
uint8_t seen_config[56], seen_attrs[144]; uint64_t seen_function, seen_params[8], seen_extra, seen_calls[16];
int launches, inits, retains, init_answer, answers[4], capture_answer, capture_status, query_answer;
static __thread uint64_t context;
int cuInit(unsigned flags) { inits++; return init_answer; }
int cuDriverGetVersion(int *v) { *v = 12090; return 0; }
int cuGetErrorName(int e, const char **s) {
  *s = e == 1 ? "CUDA_ERROR_INVALID_VALUE" : e == 100 ? "CUDA_ERROR_NO_DEVICE" : e == 999 ? NULL : "CUDA_ERROR_OTHER";
  return e == 999;
}
int cuGetErrorString(int e, const char **s) { *s = e == 999 ? NULL : e == 1 ? "invalid argument" : "something else"; return e == 999; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strncpy(s, d ? "Stub One" : "Stub Zero", n); return d > 1 ? 101 : 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = 80ull << 30; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : 1000 * d + a; return 0; }
int cuDevicePrimaryCtxRetain(uint64_t *c, int d) { retains++; *c = 0x1000 + d; return 0; }
int cuCtxSetCurrent(uint64_t c) { context = c; return 0; }
int cuCtxGetCurrent(uint64_t *c) { *c = context; return 0; }
int cuCtxGetDevice(int *d) { if (!context) return 201; *d = (int)(context - 0x1000); return 0; }
int cuLaunchKernelEx(const Config *c, uint64_t f, void **params, void *extra) {
  int result = answers[launches++ & 3];
  if (result) return result;
  if (!context) return 201;
  memcpy(seen_config, c, 56);
  if (c->num_attrs) memcpy(seen_attrs, c->attrs, 72 * c->num_attrs);
  seen_function = f; seen_extra = (uint64_t)extra;
  seen_params[0] = params ? *(uint64_t *)params[0] : 0;
  seen_params[1] = params ? *(uint32_t *)params[1] : 0;
  seen_params[2] = context;
  return 0;
}
int cuFuncSetAttribute(uint64_t f, int a, int v) { seen_calls[0] = f; seen_calls[1] = a; seen_calls[2] = v; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, uint64_t f, int threads, size_t smem) {
  *n = f == 7 ? threads + (int)smem : 0; return 0;
}
int cuStreamSynchronize(uint64_t s) { seen_calls[0] = s; return 0; }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t n) {
  seen_calls[0] = from; for (size_t i = 0; i < n; i++) ((unsigned char *)to)[i] = (unsigned char)(i + 1); return 0;
}
int cuStreamIsCapturing(uint64_t s, int *status) { *status = capture_status; return capture_answer; }
int cuEventCreate(uint64_t *e, unsigned flags) { *e = 0xfedcba9876543210ull; return flags == 2 ? 0 : 1; }
int cuEventRecord(uint64_t e, uint64_t s) { seen_calls[0] = e; seen_calls[1] = s; return 0; }
int cuEventQuery(uint64_t e) { return query_answer; }
int cuEventDestroy_v2(uint64_t e) { seen_calls[2] = e; return 0; }
int cuMemsetD2D8Async(uint64_t p, size_t pitch, unsigned char v, size_t w, size_t h, uint64_t s) {
  uint64_t a[6] = {p, pitch, v, w, h, s}; memcpy(seen_calls, a, sizeof a); return 0;
}
int cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *p, const uint64_t *size, const uint64_t *pitch, const uint32_t *box,
                           const uint32_t *step, int interleave, int swizzle, int l2, int fill) {
  uint64_t a[16] = {(uint64_t)map % 64, type, rank, (uint64_t)p, size[0], size[1], size[2], pitch[0], pitch[1], box[0], box[1], box[2],
                    step[0] * step[1] * step[2], interleave * 1000 + swizzle * 100 + l2 * 10 + fill};
  memcpy(seen_calls, a, sizeof a); memset(map, 0x5A, 128); return box[0] > 256;
}
"""

BIG = 0xFEDC_BA98_7654_3210  # a handle or address that 32 bits, or a signed 64, would mangle


class Stub:
    """A fresh copy of cugemm.driver (its module state untouched by other tests) on a freshly loaded stub."""

    def __init__(self, library: Path) -> None:
        spec = importlib.util.spec_from_file_location("cugemm.driver_on_stub", cugemm.driver.__file__)
        assert spec is not None
        assert spec.loader is not None
        self.driver = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.driver)
        self.driver.LIBRARY = str(library)
        self.library = ctypes.CDLL(str(library))

    def int(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self.library, name)

    def calls(self) -> list[int]:
        return list((ctypes.c_uint64 * 16).in_dll(self.library, "seen_calls"))

    def answer(self, *results: int) -> None:
        self.int("launches").value = 0
        (ctypes.c_int * 4).in_dll(self.library, "answers")[:] = [*results, 0, 0, 0, 0][:4]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc to build the stub libcuda")
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.c").write_text(STUB)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", folder / "stub.so", folder / "stub.c"], check=True)
    return folder / "stub.so"


@pytest.fixture
def stub(built: Path, tmp_path: Path) -> Stub:
    return Stub(Path(shutil.copy(built, tmp_path / "libstub.so")))  # another path = another copy of its globals


class Launch:
    """A packed launch: kernel arguments (uint64 BIG, uint32 17), cluster (2, 1, 1) and PDL attributes."""

    def __init__(self, driver: object) -> None:
        self.attrs = (driver.LaunchAttribute * 2)()
        self.attrs[0].id, self.attrs[0].value[0:3] = driver.CLUSTER_DIMENSION, (2, 1, 1)
        self.attrs[1].id, self.attrs[1].value[0] = driver.PROGRAMMATIC_STREAM_SERIALIZATION, 1
        self.config = driver.LaunchConfig(
            (2, 3, 4), (128, 1, 1), 65536, stream=BIG, attrs=ctypes.addressof(self.attrs), num_attrs=len(self.attrs)
        )
        self.values = (ctypes.c_uint64(BIG), ctypes.c_uint32(17))
        self.params = (ctypes.c_void_p * 2)(*(ctypes.addressof(v) for v in self.values))
        self.driver = driver

    def go(self, device: int) -> None:
        self.driver.launch(ctypes.addressof(self.config), BIG, ctypes.addressof(self.params), device)


def test_struct_layout_is_the_one_of_cuda_h() -> None:
    config, attribute = cugemm.driver.LaunchConfig, cugemm.driver.LaunchAttribute
    assert ctypes.sizeof(config) == 56
    assert [getattr(config, f).offset for f in ("grid", "block", "smem", "stream", "attrs", "num_attrs")] == [0, 12, 24, 32, 40, 48]
    assert (ctypes.sizeof(attribute), attribute.id.offset, attribute.value.offset) == (72, 0, 8)


def test_launch_delivers_every_byte(stub: Stub) -> None:
    packed = Launch(stub.driver)
    stub.driver.bind(0)
    packed.go(0)
    assert bytes((ctypes.c_uint8 * 56).in_dll(stub.library, "seen_config")) == bytes(packed.config)
    seen = (stub.driver.LaunchAttribute * 2).in_dll(stub.library, "seen_attrs")
    assert [(a.id, list(a.value[:3])) for a in seen] == [(4, [2, 1, 1]), (6, [1, 0, 0])]
    assert ctypes.c_uint64.in_dll(stub.library, "seen_function").value == BIG
    assert ctypes.c_uint64.in_dll(stub.library, "seen_extra").value == 0
    assert list((ctypes.c_uint64 * 2).in_dll(stub.library, "seen_params")) == [BIG, 17]
    assert packed.config.stream == BIG


def test_a_thread_without_a_context_gets_the_primary_one(stub: Stub) -> None:
    devices = []

    def work() -> None:
        Launch(stub.driver).go(1)
        devices.append(stub.driver.current_device())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert devices == [1]
    assert (stub.int("launches").value, stub.int("retains").value) == (2, 1)


@pytest.mark.parametrize("result", [3, 201, 400, 709])
def test_a_thread_on_another_device_visits_and_returns(stub: Stub, result: int) -> None:
    stub.driver.bind(0)
    stub.answer(result)
    Launch(stub.driver).go(1)
    assert stub.int("launches").value == 2
    assert ctypes.c_uint64.in_dll(stub.library, "seen_params").value == BIG
    assert (ctypes.c_uint64 * 3).in_dll(stub.library, "seen_params")[2] == 0x1001
    assert stub.driver.current_device() == 0


def test_a_destroyed_primary_context_is_retained_anew(stub: Stub) -> None:
    stub.driver.bind(0)
    stub.driver.bind(1)
    stub.driver.bind(0)
    assert stub.int("retains").value == 2
    stub.answer(709)
    Launch(stub.driver).go(1)
    assert stub.int("retains").value == 3


def test_retried_once_only(stub: Stub) -> None:
    stub.answer(201, 201, 0)
    with pytest.raises(CudaError, match=r"cuLaunchKernelEx: CUDA_ERROR_OTHER \(201, something else\)"):
        Launch(stub.driver).go(0)
    assert stub.int("launches").value == 2


def test_launch_error_names_error_and_launch(stub: Stub) -> None:
    stub.driver.bind(0)
    stub.answer(1)
    with pytest.raises(CudaError) as caught:
        Launch(stub.driver).go(0)
    assert str(caught.value) == (
        "cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE (1, invalid argument); "
        "grid (2, 3, 4), block (128, 1, 1), 65536 bytes of dynamic shared memory, device 0"
    )
    assert stub.int("launches").value == 1


def test_an_error_without_a_name(stub: Stub) -> None:
    stub.driver.bind(0)
    stub.answer(999)
    with pytest.raises(CudaError, match=r"cuLaunchKernelEx: CUDA error \(999, no explanation\)"):
        Launch(stub.driver).go(0)


def test_device_queries(stub: Stub) -> None:
    driver = stub.driver
    assert driver.available()
    assert driver.version() == (12, 9)
    assert driver.device_count() == 2
    assert driver.device_name(1) == "Stub One"
    assert driver.total_memory(0) == 80 << 30
    assert driver.capability(1) == (9, 0)
    assert driver.attribute(1, "multiprocessor_count") == 1016
    assert stub.int("inits").value == 1
    with pytest.raises(CudaError, match="cuDeviceGetName: CUDA_ERROR_OTHER"):
        driver.device_name(5)


def test_on_device_restores_context_also_after_an_error(stub: Stub) -> None:
    driver = stub.driver
    assert driver.current_device() is None
    with driver.on_device(1):
        assert driver.current_device() == 1
        with driver.on_device(1):
            assert driver.current_device() == 1
        with pytest.raises(ZeroDivisionError), driver.on_device(0):
            raise ZeroDivisionError
        assert driver.current_device() == 1
    assert driver.current_device() is None


def test_is_capturing(stub: Stub) -> None:
    driver, answer, status = stub.driver, stub.int("capture_answer"), stub.int("capture_status")
    assert driver.is_capturing(BIG) is False
    status.value = 1
    assert driver.is_capturing(BIG) is True
    status.value, answer.value = 0, 906  # the legacy stream while another stream is captured
    assert driver.is_capturing(0) is True
    answer.value = 201
    assert driver.is_capturing(0) is False
    answer.value = 1
    with pytest.raises(CudaError, match="cuStreamIsCapturing: CUDA_ERROR_INVALID_VALUE"):
        driver.is_capturing(BIG)


def test_events(stub: Stub) -> None:
    event = stub.driver.event_create()
    assert event == BIG
    stub.driver.event_record(event, BIG + 1)
    query = stub.int("query_answer")
    query.value = 600
    assert stub.driver.event_done(event) is False
    query.value = 0
    assert stub.driver.event_done(event) is True
    query.value = 1
    with pytest.raises(CudaError, match="cuEventQuery"):
        stub.driver.event_done(event)
    stub.driver.event_destroy(event)
    assert stub.calls()[:3] == [BIG, BIG + 1, BIG]


def test_memset(stub: Stub) -> None:
    stub.driver.memset_2d(BIG, 1 << 33, 1 << 32, 7, BIG + 1)
    assert stub.calls()[:6] == [BIG, 1 << 33, 0, 1 << 32, 7, BIG + 1]


def test_tensor_map(stub: Stub) -> None:
    """128-byte swizzle, promotion to 256 bytes in L2, zeros from outside; the driver wants its memory at a multiple of 64."""
    encoded = stub.driver.tensor_map(BIG, 2, (1 << 32, 7, 3), (1 << 39, 48), (64, 128, 1))
    assert encoded == b"\x5a" * 128
    assert stub.calls()[:14] == [0, 1, 3, BIG, 1 << 32, 7, 3, 1 << 39, 48, 64, 128, 1, 1, 330]
    stub.driver.tensor_map(16, 1, (128, 7, 3), (128, 896), (128, 128, 1))
    assert stub.calls()[1] == 0
    with pytest.raises(CudaError, match=r"cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE \(1, invalid argument\)"):
        stub.driver.tensor_map(16, 1, (128, 7, 3), (128, 896), (257, 128, 1))


def test_functions(stub: Stub) -> None:
    stub.driver.set_max_dynamic_smem(BIG, 200_000)
    assert stub.calls()[:3] == [BIG, 8, 200_000]
    assert stub.driver.occupancy(7, 128, 3) == 131


def test_no_device(stub: Stub) -> None:
    stub.int("init_answer").value = 100
    assert stub.driver.available() is False
    with pytest.raises(CudaError, match=r"cuInit: CUDA_ERROR_NO_DEVICE \(100, something else\)"):
        stub.driver.device_count()
    stub.int("init_answer").value = 0
    assert stub.driver.available() is True


def test_no_driver_at_all(stub: Stub) -> None:
    stub.driver.LIBRARY = "libcuda_that_is_not_there.so.1"
    assert stub.driver.available() is False
    for call in (stub.driver.device_count, lambda: Launch(stub.driver).go(0)):
        with pytest.raises(CudaError, match=r"no NVIDIA driver: libcuda_that_is_not_there\.so\.1.*--gpus all.*host memory"):
            call()


def test_copies_to_the_host_and_waits(stub: Stub) -> None:
    memory = (ctypes.c_ubyte * 3)()
    stub.driver.copy_to_host(ctypes.addressof(memory), BIG, 3)
    assert list(memory) == [1, 2, 3] and stub.calls()[0] == BIG
    stub.driver.synchronize(BIG + 1)
    assert stub.calls()[0] == BIG + 1


def test_driver_older_than_launch_ex(stub: Stub, tmp_path: Path) -> None:
    source = tmp_path / "old.c"
    source.write_text("int cuInit(unsigned f) { return 0; }")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "old.so", source], check=True)
    stub.driver.LIBRARY = str(tmp_path / "old.so")
    with pytest.raises(CudaError, match=r"old\.so is too old: .*undefined symbol.*CUDA 12"):
        stub.driver.version()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_a_sentence(built: Path) -> None:
    code = f"""
import os, sys
from cugemm import driver
driver.LIBRARY = {str(built)!r}
early = os.fork()
if early == 0:
    os._exit(0 if driver.available() else 1)  # forked before CUDA was used: all is well
assert os.waitstatus_to_exitcode(os.waitpid(early, 0)[1]) == 0
assert driver.device_count() == 2
late = os.fork()
if late == 0:
    texts = []
    for call in (driver.device_count, lambda: driver.launch(0, 0, 0, 0)):
        try:
            call()
        except driver.CudaError as error:
            texts.append("forked" in str(error) and "spawn" in str(error))
    os._exit(0 if texts == [True, True] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(late, 0)[1]) == 0
assert driver.device_count() == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(cugemm.driver.__file__).parents[1], timeout=60)


def test_threads_load_it_once(stub: Stub) -> None:
    barrier, counts = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        counts.append(stub.driver.device_count())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [2] * 8
    assert stub.int("inits").value == 1
