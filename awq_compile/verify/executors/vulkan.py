"""Runs SPIR-V kernels through any Vulkan driver, by the calling convention of TVM's Vulkan runtime.

    executor = VulkanExecutor()
    executor.load(session.shaders)
    executor.launch("add_kernel", [a, b, out, 128], grid=(2, 1, 1))      # `out` holds the result

Each launch copies the arrays in, waits for the kernel, and copies back what the shader may write. The
memory of a launch is kept for the next ones.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from awq_compile.errors import EnvironmentMissingError, UsageError
from awq_compile.targets.vulkan.spirv.shader import HANDLE, SLOT_BYTES, Shader
from awq_compile.verify.executors.base import KernelError

Array = npt.NDArray[Any]
Argument = Array | int | float | np.generic

_PACKING: Final = {"int32": "<ixxxx", "int64": "<q", "uint32": "<Ixxxx", "float32": "<fxxxx", "float64": "<d"}
_GRANULE: Final = 256  # buffers are this many bytes, or twice, four times, … as many
_HINT: Final = "for a software driver: apt-get install mesa-vulkan-drivers libvulkan1"


def _binding() -> Any:
    """The PyPI module `vulkan`, which loads the system's Vulkan loader when imported."""
    try:
        import vulkan
    except ImportError:
        raise EnvironmentMissingError("the package `vulkan` is not installed", hint="pip install vulkan") from None
    except OSError as error:
        raise EnvironmentMissingError(f"there is no Vulkan loader here: {error}", hint=_HINT) from None
    return vulkan


@dataclass(frozen=True)
class _Buffer:
    handle: Any
    memory: Any
    bytes: Array  # mapped
    size: int


@dataclass(frozen=True)
class _Pipeline:
    shader: Shader
    written: tuple[bool, ...]
    objects: tuple[Any, ...]  # shader module, set layout, pool, pipeline layout, pipeline
    layout: Any
    pipeline: Any
    descriptors: Any


@dataclass(frozen=True)
class DeviceInfo:
    """What a driver says of its device."""

    name: str
    subgroup_size: int
    shared_bytes: int
    max_threads: int
    max_grid: tuple[int, int, int]
    max_buffers: int
    features: frozenset[str]


class VulkanExecutor:
    """One device. Without `device_index`: the first discrete or integrated GPU, else the first device."""

    def __init__(self, device_index: int | None = None) -> None:
        self._vk = _binding()
        self._instance = self._device = None
        self._pipelines: dict[str, _Pipeline] = {}
        self._shaders: dict[str, Shader] = {}
        self._free: dict[int, list[_Buffer]] = defaultdict(list)
        self._buffers: list[_Buffer] = []
        self._instance = self._create_instance()
        self._physical = self._choose(device_index)
        self.info, chain = self._describe()
        self._create_device(chain)

    # --- the device

    def _create_instance(self) -> Any:
        vk = self._vk
        application = vk.VkApplicationInfo(pApplicationName="awq-compile", apiVersion=vk.VK_MAKE_VERSION(1, 2, 0))
        try:
            return vk.vkCreateInstance(vk.VkInstanceCreateInfo(pApplicationInfo=application), None)
        except vk.VkError as error:
            raise EnvironmentMissingError(f"Vulkan could not be started: {error!r}", hint=_HINT) from None

    def _choose(self, index: int | None) -> Any:
        vk = self._vk
        try:
            devices = list(vk.vkEnumeratePhysicalDevices(self._instance))
        except vk.VkError as error:
            raise EnvironmentMissingError(f"no Vulkan driver answers: {error!r}", hint=_HINT) from None
        if not devices:
            raise EnvironmentMissingError("no Vulkan driver is installed, or none finds its device", hint=_HINT)
        if index is not None:
            if not 0 <= index < len(devices):
                raise EnvironmentMissingError(f"there is no Vulkan device {index}; devices are 0 to {len(devices) - 1}")
            return devices[index]
        order = (vk.VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU, vk.VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU)
        types = [vk.vkGetPhysicalDeviceProperties(d).deviceType for d in devices]
        return next(
            (d for wanted in order for d, have in zip(devices, types, strict=True) if have == wanted), devices[0]
        )

    def _describe(self) -> tuple[DeviceInfo, Any]:
        """The device's data, and the chain of features that it has and the executor enables."""
        vk, ffi = self._vk, self._vk.ffi
        storage16 = ffi.new("VkPhysicalDevice16BitStorageFeatures*")
        storage8 = ffi.new("VkPhysicalDevice8BitStorageFeatures*", {"pNext": storage16})
        small = ffi.new("VkPhysicalDeviceShaderFloat16Int8Features*", {"pNext": storage8})
        chain = ffi.new("VkPhysicalDeviceFeatures2*", {"pNext": small})
        storage16.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES
        storage8.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_8BIT_STORAGE_FEATURES
        small.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES
        chain.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2
        vk.vkGetPhysicalDeviceFeatures2(self._physical, chain)
        subgroup = ffi.new("VkPhysicalDeviceSubgroupProperties*")
        subgroup.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES
        properties = ffi.new("VkPhysicalDeviceProperties2*", {"pNext": subgroup})
        properties.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2
        vk.vkGetPhysicalDeviceProperties2(self._physical, properties)
        limits, features = properties.properties.limits, chain.features
        has = {
            "float16": small.shaderFloat16,
            "int8": small.shaderInt8,
            "int16": features.shaderInt16,
            "int64": features.shaderInt64,
            "float64": features.shaderFloat64,
            "storage8": storage8.storageBuffer8BitAccess,
            "storage16": storage16.storageBuffer16BitAccess,
            "shuffle": subgroup.supportedOperations & vk.VK_SUBGROUP_FEATURE_SHUFFLE_BIT,
        }
        info = DeviceInfo(
            name=ffi.string(properties.properties.deviceName).decode(),
            subgroup_size=int(subgroup.subgroupSize),
            shared_bytes=int(limits.maxComputeSharedMemorySize),
            max_threads=int(limits.maxComputeWorkGroupInvocations),
            max_grid=tuple(limits.maxComputeWorkGroupCount),
            max_buffers=int(limits.maxPerStageDescriptorStorageBuffers),
            features=frozenset(name for name, value in has.items() if value),
        )
        self._keep = (storage16, storage8, small)  # `chain` points to them
        return info, chain

    def _create_device(self, chain: Any) -> None:
        vk = self._vk
        families = vk.vkGetPhysicalDeviceQueueFamilyProperties(self._physical)
        family = next((i for i, f in enumerate(families) if f.queueFlags & vk.VK_QUEUE_COMPUTE_BIT), None)
        if family is None:
            raise EnvironmentMissingError(f"the Vulkan device {self.info.name} computes nothing")
        queue = vk.VkDeviceQueueCreateInfo(queueFamilyIndex=family, queueCount=1, pQueuePriorities=[1.0])
        create = vk.VkDeviceCreateInfo(pNext=chain, queueCreateInfoCount=1, pQueueCreateInfos=[queue])
        self._device = vk.vkCreateDevice(self._physical, create, None)
        self._queue = vk.vkGetDeviceQueue(self._device, family, 0)
        flags = vk.VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT
        pool = vk.VkCommandPoolCreateInfo(flags=flags, queueFamilyIndex=family)
        self._pool = vk.vkCreateCommandPool(self._device, pool, None)
        allocate = vk.VkCommandBufferAllocateInfo(
            commandPool=self._pool, level=vk.VK_COMMAND_BUFFER_LEVEL_PRIMARY, commandBufferCount=1
        )
        self._commands = vk.vkAllocateCommandBuffers(self._device, allocate)[0]

    # --- kernels

    def load(self, shaders: Mapping[str, Shader]) -> None:
        """Makes kernels known, by name; their pipelines are compiled at the first launch."""
        for name, shader in shaders.items():
            old = self._pipelines.pop(name, None)
            if old is not None:
                self._destroy(old)
            self._shaders[name] = shader

    def launch(
        self,
        kernel: str,
        args: Sequence[Argument],
        grid: tuple[int, int, int],
        block: tuple[int, int, int] | None = None,
    ) -> None:
        """Runs a kernel and waits for it. `block`, where given, must be what the shader was compiled for."""
        pipeline = self._pipeline(kernel)
        if block is not None and block != pipeline.shader.local_size:
            raise UsageError(f"{kernel} was compiled for {pipeline.shader.local_size} threads a block, not {block}")
        arrays, scalars = self._sort_arguments(pipeline.shader, args)
        self._check_grid(kernel, grid)
        if 0 in grid:
            return
        by_address: dict[tuple[int, int], _Buffer] = {}
        used = [by_address.get((a.ctypes.data, a.nbytes)) or self._enter(by_address, a) for a in arrays]
        slots: _Buffer | None = None
        try:
            if pipeline.shader.uses_uniform_buffer:
                slots = self._acquire(len(scalars), uniform=True)
                slots.bytes[: len(scalars)] = np.frombuffer(scalars, np.uint8)
            self._bind(pipeline, used, slots)
            try:
                self._submit(pipeline, b"" if slots else scalars, grid)
            except self._vk.VkError as error:  # a GPU that meets a fault is lost
                raise KernelError(f"{kernel}: the device gives up: {error!r}") from None
            for array, buffer, written in zip(arrays, used, pipeline.written, strict=True):
                if written:
                    array.reshape(-1).view(np.uint8)[:] = buffer.bytes[: array.nbytes]
        finally:
            for buffer in by_address.values():
                self._free[buffer.size].append(buffer)
            if slots is not None:
                self._free[-slots.size].append(slots)

    def _sort_arguments(self, shader: Shader, args: Sequence[Argument]) -> tuple[list[Array], bytes]:
        if len(args) != len(shader.arguments):
            raise UsageError(f"{shader.name} takes {len(shader.arguments)} arguments, {len(args)} were given")
        arrays: list[Array] = []
        scalars = b""
        for i, (kind, value) in enumerate(zip(shader.arguments, args, strict=True)):
            if (kind == HANDLE) != isinstance(value, np.ndarray):
                raise UsageError(f"argument {i} of {shader.name} is {kind}, {type(value).__name__} was given")
            if isinstance(value, np.ndarray):
                if not value.flags.c_contiguous:
                    raise UsageError(f"argument {i} of {shader.name} is not contiguous")
                arrays.append(value)
            else:
                scalars += struct.pack(_PACKING[kind], value)
        assert len(scalars) % SLOT_BYTES == 0
        return arrays, scalars

    def _check_grid(self, kernel: str, grid: tuple[int, int, int]) -> None:
        for axis, blocks, limit in zip("xyz", grid, self.info.max_grid, strict=True):
            if not 0 <= blocks <= limit:
                raise UsageError(f"{kernel}: {blocks} blocks along {axis}, {self.info.name} takes 0 to {limit}")

    def _enter(self, by_address: dict[tuple[int, int], _Buffer], array: Array) -> _Buffer:
        """A buffer with the array's content."""
        buffer = self._acquire(array.nbytes)
        buffer.bytes[: array.nbytes] = array.reshape(-1).view(np.uint8)
        by_address[array.ctypes.data, array.nbytes] = buffer
        return buffer

    # --- memory

    def _acquire(self, nbytes: int, *, uniform: bool = False) -> _Buffer:
        """A buffer of at least `nbytes`, with any content."""
        size = _GRANULE
        while size < nbytes:
            size *= 2
        kept = self._free[-size if uniform else size]
        return kept.pop() if kept else self._allocate(size, uniform=uniform)

    def _allocate(self, size: int, *, uniform: bool) -> _Buffer:
        vk = self._vk
        usage = vk.VK_BUFFER_USAGE_UNIFORM_BUFFER_BIT if uniform else vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT
        create = vk.VkBufferCreateInfo(size=size, usage=usage, sharingMode=vk.VK_SHARING_MODE_EXCLUSIVE)
        handle = vk.vkCreateBuffer(self._device, create, None)
        needs = vk.vkGetBufferMemoryRequirements(self._device, handle)
        allocate = vk.VkMemoryAllocateInfo(allocationSize=needs.size, memoryTypeIndex=self._type(needs.memoryTypeBits))
        memory = vk.vkAllocateMemory(self._device, allocate, None)
        vk.vkBindBufferMemory(self._device, handle, memory, 0)
        mapped = vk.vkMapMemory(self._device, memory, 0, size, 0)
        buffer = _Buffer(handle, memory, np.frombuffer(mapped, np.uint8), size)
        self._buffers.append(buffer)
        return buffer

    def _type(self, bits: int) -> int:
        """A memory type that the host sees: cached if there is one."""
        vk = self._vk
        properties = vk.vkGetPhysicalDeviceMemoryProperties(self._physical)
        wanted = vk.VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | vk.VK_MEMORY_PROPERTY_HOST_COHERENT_BIT
        for flags in (wanted | vk.VK_MEMORY_PROPERTY_HOST_CACHED_BIT, wanted):
            for i in range(properties.memoryTypeCount):
                if bits >> i & 1 and properties.memoryTypes[i].propertyFlags & flags == flags:
                    return i
        raise EnvironmentMissingError(f"{self.info.name} has no memory that the host can see")

    # --- pipelines

    def _pipeline(self, kernel: str) -> _Pipeline:
        if kernel not in self._pipelines:
            if kernel not in self._shaders:
                raise UsageError(f"there is no kernel {kernel}", hint=f"known: {', '.join(sorted(self._shaders))}")
            self._pipelines[kernel] = self._compile(self._shaders[kernel])
        return self._pipelines[kernel]

    def _compile(self, shader: Shader) -> _Pipeline:
        vk, device = self._vk, self._device
        code = struct.pack(f"<{len(shader.words)}I", *shader.words)
        module = vk.vkCreateShaderModule(device, vk.VkShaderModuleCreateInfo(codeSize=len(code), pCode=code), None)
        count = shader.arguments.count(HANDLE)
        if count > self.info.max_buffers:  # a driver may crash instead of refusing
            raise UsageError(f"{shader.name} has {count} buffers, {self.info.name} takes {self.info.max_buffers}")
        kinds = [vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER] * count
        if shader.uses_uniform_buffer:
            kinds.append(vk.VK_DESCRIPTOR_TYPE_UNIFORM_BUFFER)
        stage = vk.VK_SHADER_STAGE_COMPUTE_BIT
        bindings = [vk.VkDescriptorSetLayoutBinding(i, kind, 1, stage) for i, kind in enumerate(kinds)]
        set_create = vk.VkDescriptorSetLayoutCreateInfo(bindingCount=len(bindings), pBindings=bindings)
        set_layout = vk.vkCreateDescriptorSetLayout(device, set_create, None)
        slot_bytes = 0 if shader.uses_uniform_buffer else SLOT_BYTES * (len(shader.arguments) - count)
        ranges = [vk.VkPushConstantRange(stage, 0, slot_bytes)] if slot_bytes else []
        layout_create = vk.VkPipelineLayoutCreateInfo(
            setLayoutCount=1,
            pSetLayouts=[set_layout],
            pushConstantRangeCount=len(ranges),
            pPushConstantRanges=ranges,
        )
        layout = vk.vkCreatePipelineLayout(device, layout_create, None)
        entry = vk.VkPipelineShaderStageCreateInfo(stage=stage, module=module, pName=shader.name)
        create = vk.VkComputePipelineCreateInfo(stage=entry, layout=layout)
        pipeline = vk.vkCreateComputePipelines(device, None, 1, [create], None)[0]
        sizes = [vk.VkDescriptorPoolSize(kind, kinds.count(kind)) for kind in sorted(set(kinds))]
        pool_create = vk.VkDescriptorPoolCreateInfo(maxSets=1, poolSizeCount=len(sizes), pPoolSizes=sizes)
        pool = vk.vkCreateDescriptorPool(device, pool_create, None)
        allocate = vk.VkDescriptorSetAllocateInfo(descriptorPool=pool, descriptorSetCount=1, pSetLayouts=[set_layout])
        descriptors = vk.vkAllocateDescriptorSets(device, allocate)[0]
        objects = (module, set_layout, pool, layout, pipeline)
        return _Pipeline(shader, shader.written_bindings, objects, layout, pipeline, descriptors)

    def _bind(self, pipeline: _Pipeline, buffers: Sequence[_Buffer], slots: _Buffer | None) -> None:
        vk = self._vk
        kinds = [(b, vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER) for b in buffers]
        if slots is not None:
            kinds.append((slots, vk.VK_DESCRIPTOR_TYPE_UNIFORM_BUFFER))
        writes = [
            vk.VkWriteDescriptorSet(
                dstSet=pipeline.descriptors,
                dstBinding=i,
                descriptorCount=1,
                descriptorType=kind,
                pBufferInfo=[vk.VkDescriptorBufferInfo(b.handle, 0, b.size)],
            )
            for i, (b, kind) in enumerate(kinds)
        ]
        if writes:
            vk.vkUpdateDescriptorSets(self._device, len(writes), writes, 0, None)

    def _submit(self, pipeline: _Pipeline, push: bytes, grid: tuple[int, int, int]) -> None:
        vk, commands = self._vk, self._commands
        point = vk.VK_PIPELINE_BIND_POINT_COMPUTE
        once = vk.VkCommandBufferBeginInfo(flags=vk.VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT)
        vk.vkBeginCommandBuffer(commands, once)
        vk.vkCmdBindPipeline(commands, point, pipeline.pipeline)
        vk.vkCmdBindDescriptorSets(commands, point, pipeline.layout, 0, 1, [pipeline.descriptors], 0, None)
        if push:
            data = vk.ffi.new("char[]", push)
            vk.vkCmdPushConstants(commands, pipeline.layout, vk.VK_SHADER_STAGE_COMPUTE_BIT, 0, len(push), data)
        vk.vkCmdDispatch(commands, *grid)
        vk.vkEndCommandBuffer(commands)
        submit = vk.VkSubmitInfo(commandBufferCount=1, pCommandBuffers=[commands])
        vk.vkQueueSubmit(self._queue, 1, [submit], None)
        vk.vkQueueWaitIdle(self._queue)

    # --- the end

    def _destroy(self, pipeline: _Pipeline) -> None:
        vk = self._vk
        module, set_layout, pool, layout, compiled = pipeline.objects
        vk.vkDestroyPipeline(self._device, compiled, None)
        vk.vkDestroyPipelineLayout(self._device, layout, None)
        vk.vkDestroyDescriptorPool(self._device, pool, None)
        vk.vkDestroyDescriptorSetLayout(self._device, set_layout, None)
        vk.vkDestroyShaderModule(self._device, module, None)

    def close(self) -> None:
        """Frees everything; the executor must not be used after it."""
        vk = self._vk
        if self._device is not None:
            for pipeline in self._pipelines.values():
                self._destroy(pipeline)
            for buffer in self._buffers:
                vk.vkUnmapMemory(self._device, buffer.memory)
                vk.vkDestroyBuffer(self._device, buffer.handle, None)
                vk.vkFreeMemory(self._device, buffer.memory, None)
            vk.vkDestroyCommandPool(self._device, self._pool, None)
            vk.vkDestroyDevice(self._device, None)
            self._device = None
        if self._instance is not None:
            vk.vkDestroyInstance(self._instance, None)
            self._instance = None
        self._pipelines.clear()
        self._buffers.clear()
        self._free.clear()

    def __enter__(self) -> VulkanExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
