// A device that is not the CPU, for machines that have none: its memory is the host's, and the CPU computes for it. What
// torch does for each other device it does for this one: the backward runs in a thread of the device, tensors of two
// devices do not mix, autocast and random numbers are its own.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>

namespace {

using at::Tensor;
using std::optional;

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);

// --- what torch wants to know of a device ---

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(TYPE, &memory);

// One device, one stream, and nothing to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }

  c10::DeviceType type() const override { return TYPE; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

at::Generator& generator() {
  static at::Generator one = at::detail::createCPUGenerator();
  return one;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return generator().clone(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
};

Hooks hooks;
const bool HOOKED = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// --- between here and there ---

// The same memory as a tensor of the CPU.
Tensor here(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device() != DEVICE) return tensor;
  const auto& storage = tensor.storage();
  auto options = tensor.options().device(c10::DeviceType::CPU).requires_grad(false);
  auto all = at::from_blob(storage.mutable_data(), {int64_t(storage.nbytes() / tensor.element_size())}, options);
  auto seen = all.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) seen = seen.conj();
  return tensor.is_neg() ? at::_neg_view(seen) : seen;
}

optional<Tensor> here(const optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? optional<Tensor>(here(*tensor)) : std::nullopt;
}

// A copy of a tensor of the CPU.
Tensor away(const Tensor& tensor) { return tensor.defined() ? tensor.to(DEVICE) : tensor; }

// A view of `base`, with the shape, the strides and the type that the CPU gave to its view of the same memory.
Tensor as_there(const Tensor& base, const Tensor& view) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), view.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
  return made;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  here(to).copy_(here(from));
  return to;
}

// --- memory and views ---

Tensor empty(at::IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<at::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  auto bytes = at::detail::computeStorageNbytesContiguous(sizes, self.element_size(), self.storage_offset());
  auto storage = self.storage();
  if (storage.nbytes() < bytes) {
    auto data = memory.allocate(bytes);
    if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
  return self;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  // A view that was written into keeps its strides.
  if (to.sizes() != from.sizes()) resize_(to, c10::fromIntArrayRefSlow(from.sizes()), std::nullopt);
  return copy_from(from, to, false);
}

Tensor& set_source(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                   c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

Tensor& set_source_tensor(Tensor& self, const Tensor& source) {
  return set_source(self, source.storage(), source.storage_offset(), c10::fromIntArrayRefSlow(source.sizes()),
                    c10::fromIntArrayRefSlow(source.strides()));
}

Tensor& set_source_storage(Tensor& self, at::Storage source) {
  c10::SymInt length = int64_t(source.nbytes() / self.element_size()), step = 1;
  return set_source(self, std::move(source), 0, c10::SymIntArrayRef(length), c10::SymIntArrayRef(step));
}

Tensor strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, optional<int64_t> offset) {
  auto made = as_there(self, self);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return made;
}

Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return strided(self, size, stride, self.storage_offset());
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return as_there(self, here(self).view(C10_AS_INTARRAYREF_SLOW(size)));
}

Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return as_there(self, here(self).unfold(dimension, size, step));
}

Tensor view_as_real(const Tensor& self) { return as_there(self, at::view_as_real(here(self))); }
Tensor view_as_complex(const Tensor& self) { return as_there(self, at::view_as_complex(here(self))); }
at::Scalar local_scalar_dense(const Tensor& self) { return here(self).item(); }

// --- random numbers, which are those of the device also where no generator is given ---

Tensor& uniform_(Tensor& self, double from, double to, optional<at::Generator> given) {
  here(self).uniform_(from, to, given.value_or(generator()));
  return self;
}

Tensor& normal_(Tensor& self, double mean, double std, optional<at::Generator> given) {
  here(self).normal_(mean, std, given.value_or(generator()));
  return self;
}

Tensor& bernoulli_(Tensor& self, double p, optional<at::Generator> given) {
  here(self).bernoulli_(p, given.value_or(generator()));
  return self;
}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& self, double p, optional<bool> train) {
  auto kept = at::ones_like(self, self.options().dtype(at::kBool));
  if (train.has_value() && !*train) return {self.clone(), kept};
  bernoulli_(kept, 1 - p, std::nullopt);
  return {self * kept / (1 - p), kept};
}

Tensor rng_state() { return generator().get_state(); }
void set_rng_state(const Tensor& state) { generator().set_state(state); }

// --- what each device must have of its own ---

Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, c10::SymIntArrayRef stride,
                   c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                   c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  return away(at::convolution_symint(here(x), here(weight), here(bias), stride, padding, dilation, transposed,
                                     output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups,
    std::array<bool, 3> mask) {
  c10::SymInt channels = grad.sym_size(1);
  auto [of_x, of_weight, of_bias] = at::convolution_backward_symint(
      here(grad), here(x), here(weight), c10::SymIntArrayRef(channels), stride, padding, dilation, transposed,
      output_padding, groups, mask);
  return {away(of_x), away(of_weight), away(of_bias)};
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }
TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

// What resolves a conjugate copies it, and would come here again.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage", set_source_storage);
  m.impl("set_.source_Storage_storage_offset", set_source);
  m.impl("set_.source_Tensor", set_source_tensor);
  m.impl("as_strided", strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("unfold", unfold);
  m.impl("view_as_real", view_as_real);
  m.impl("view_as_complex", view_as_complex);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("uniform_", uniform_);
  m.impl("normal_", normal_);
  m.impl("bernoulli_.float", bernoulli_);
  m.impl("native_dropout", native_dropout);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(exp, fp32)
  KERNEL_PRIVATEUSEONE(sum, fp32)
}

TORCH_LIBRARY(away, m) {
  m.def("rng_state() -> Tensor", rng_state);
  m.def("set_rng_state(Tensor state) -> ()", set_rng_state);
}

}  // namespace
