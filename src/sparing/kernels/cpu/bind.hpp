// Kernels as Python functions that take the fields of their struct by name: norm(x=x, y=y, rows=1, ..., bfloat16=True).
// kernels.hpp is the one statement of what there is. A pointer is a tensor, an address or None; an enum one of its names
// or a number; a struct in a struct a dict of its fields, or None for its defaults; a List a list or tuple of such dicts.
// TypeError for a field that does not exist, for one that is missing and has no default, and for a value of another
// type. Shapes are not checked, nor types of tensors: callers do that.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.hpp"

namespace binding {

namespace nb = nanobind;

struct Structure;
struct Reading;

struct Known {  // a type of fields
  // Puts a Python value where a field lies. False if it is not of the type, with a Python error if that says more.
  bool (*set)(Reading&, const Known&, PyObject* value, char* to);
  std::string expected;
  size_t size, alignment;
  std::vector<PyObject*> choices = {};   // the names that an enum has
  const Structure* structure = nullptr;  // what a struct is, or what a list holds
};

struct Field {
  PyObject* name;  // interned, as names in a call are: mostly they are the same object
  const Known* type;
  size_t offset;
};

struct Structure {
  const char* text;
  char* defaults;  // one in which no field has been set
  std::vector<Field> fields = {};
  uint64_t required = 0;  // bit i: field i has no default
  size_t size = 0, alignment = 1;
};

// Functions of PyTorch, called from here without being looked up each time: its number of threads, a tensor's address.
struct Torch {
  PyObject *get_num_threads, *data_ptr;
};
inline Torch torch;

// A call whose fields are being read. What returns a bool returns false with a Python error set.
struct Reading {
  const char* function;
  std::vector<std::unique_ptr<char[]>> lists = {};  // that its struct points to

  template <class... Objects>
  bool fail(const char* message, Objects... objects) const {
    PyErr_Format(PyExc_TypeError, message, function, objects...);
    return false;
  }
};

// One struct of a call, whose fields are set in any order.
class Setter {
 public:
  Setter(Reading& reading, const Structure& s, char* object) : reading(reading), s(s), object(object) {
    std::memcpy(object, s.defaults, s.size);
  }

  bool set(PyObject* name, PyObject* value) {
    size_t i = find(name);
    if (i == s.fields.size()) return reading.fail("%s: no field is named %R; there are: %s", name, s.text);
    next = i + 1;
    given |= uint64_t(1) << i;
    const Known& type = *s.fields[i].type;
    if (type.set(reading, type, value, object + s.fields[i].offset)) return true;
    return !PyErr_Occurred() && reading.fail("%s: %U is %R, expected %s", name, value, type.expected.c_str());
  }

  bool has_all() const {
    uint64_t missing = s.required & ~given;
    for (const Field* field = s.fields.data(); missing; ++field, missing >>= 1)
      if (missing & 1) return reading.fail("%s: %R is missing", field->name);
    return true;
  }

 private:
  Reading& reading;
  const Structure& s;
  char* object;
  size_t next = 0;
  uint64_t given = 0;

  // From the field after the last one on: found at once where a call keeps to the order of the struct.
  size_t find(PyObject* name) const {
    size_t count = s.fields.size();
    for (size_t i = next; i < count; ++i)
      if (s.fields[i].name == name) return i;
    for (size_t i = 0; i < next; ++i)
      if (s.fields[i].name == name) return i;
    for (size_t i = 0; i < count; ++i)  // names in a dict need not be interned
      if (PyUnicode_Check(name) && PyUnicode_Compare(s.fields[i].name, name) == 0) return i;
    return count;
  }
};

template <class T>
bool put(char* to, T value) {
  std::memcpy(to, &value, sizeof(T));
  return true;
}

template <class T>
bool set_number(Reading&, const Known&, PyObject* value, char* to) {
  nb::handle from(value);
  T number{};  // mostly of this very type; conversions take longer
  return (nb::try_cast(from, number, false) || nb::try_cast(from, number, true)) && put(to, number);
}

inline bool set_address(Reading& reading, const Known& type, PyObject* value, char* to) {
  if (value == Py_None) return put<void*>(to, nullptr);
  if (PyLong_Check(value)) return set_number<uintptr_t>(reading, type, value, to);
  PyObject* found = PyObject_Vectorcall(torch.data_ptr, &value, 1, nullptr);
  if (!found && PyErr_ExceptionMatches(PyExc_TypeError)) PyErr_Clear();  // not a tensor
  bool done = found && set_number<uintptr_t>(reading, type, found, to);
  Py_XDECREF(found);
  return done;
}

inline bool set_choice(Reading&, const Known& type, PyObject* value, char* to) {
  size_t i = 0, count = type.choices.size();
  while (i < count && type.choices[i] != value) ++i;
  if (i == count && PyUnicode_Check(value))  // it need not be interned
    for (i = 0; i < count && PyUnicode_Compare(type.choices[i], value) != 0;) ++i;
  return (i < count || nb::try_cast(nb::handle(value), i)) && i < count && put(to, int(i));
}

inline bool set_structure(Reading& reading, const Known& type, PyObject* value, char* to) {
  if (value == Py_None || !PyDict_Check(value)) return value == Py_None;
  Setter setter(reading, *type.structure, to);
  PyObject *name, *given;
  for (Py_ssize_t at = 0; PyDict_Next(value, &at, &name, &given);)
    if (!setter.set(name, given)) return false;
  return setter.has_all();
}

inline bool set_list(Reading& reading, const Known& type, PyObject* value, char* to) {
  if (!PyList_Check(value) && !PyTuple_Check(value)) return false;
  size_t step = type.structure->size, count = size_t(PySequence_Size(value));
  reading.lists.push_back(std::make_unique<char[]>(step * count));
  char* data = reading.lists.back().get();
  for (size_t i = 0; i < count; ++i) {
    PyObject* one = PyList_Check(value) ? PyList_GetItem(value, i) : PyTuple_GetItem(value, i);
    if (!PyDict_Check(one) || !set_structure(reading, type, one, data + i * step)) return false;
  }
  return put(to, sparing::List<char>{data, int64_t(count)});
}

// What kernels.hpp says of its structs, read once from their text. Fields refer to it as long as there are kernels.
class Types {
 public:
  explicit Types(bool past_caches) : past_caches(past_caches) {
    add<void*>("*", set_address, "a tensor, an address or None");
    add<int64_t>("int64_t", set_number<int64_t>, "an integer of 64 bits");
    add<int>("int", set_number<int>, "an integer of 32 bits");
    add<float>("float", set_number<float>, "a number");
    add<bool>("bool", set_number<bool>, "True or False");
  }

  // Makes an enum or a struct known, under its name, to the structs that have such fields.
  template <class T>
  void add(const std::string& word) {
    if constexpr (std::is_enum_v<T>) {
      Known& known = add<T>(word, set_choice, std::string("one of ") + choices(T{}));
      for (auto& name : split(choices(T{}), ',')) known.choices.push_back(interned(name));
    } else {
      static T defaults{};
      auto structure = new Structure(describe(&defaults));
      add<T>(word, set_structure, "a dict of the fields of " + word).structure = structure;
      add<sparing::List<T>>("List<" + word + ">", set_list, "a list of dicts of the fields of " + word).structure =
          structure;
    }
  }

  // The fields of a struct, laid out as the compiler does it, and their defaults, with this machine's `past_caches`.
  template <class S>
  Structure describe(S* defaults) const {
    Structure s{S::fields, reinterpret_cast<char*>(defaults)};
    for (auto& statement : split(S::fields, ';')) {
      std::string rest = statement.substr(statement.rfind("const ", 0) == 0 ? 6 : 0);
      size_t end = rest.find_first_of(" *");
      for (auto& field : split(rest.substr(end), ',')) {  // "* y", "*w = nullptr", "rows"
        size_t first = field.find_first_not_of("* "), last = field.find_first_of(" =", first);
        std::string name = field.substr(first, last - first);
        append(s, name, first > 0 ? "*" : rest.substr(0, end), field.find('=') == field.npos);
      }
    }
    s.size = round_up(s.size, s.alignment);
    if (s.size != sizeof(S)) Py_FatalError(S::fields);  // read another way than the compiler does
    return s;
  }

  void append(Structure& s, const std::string& name, const std::string& word, bool is_required) const {
    auto found = known.find(word);
    if (found == known.end() || s.fields.size() == 64) Py_FatalError((word + " " + name).c_str());
    const Known& type = found->second;
    if (is_required) s.required |= uint64_t(1) << s.fields.size();
    s.fields.push_back({interned(name), &type, round_up(s.size, type.alignment)});
    s.size = s.fields.back().offset + type.size;
    s.alignment = std::max(s.alignment, type.alignment);
    if (name == "past_caches") put(s.defaults + s.fields.back().offset, past_caches);
  }

 private:
  std::map<std::string, Known> known;
  bool past_caches;

  template <class T>
  Known& add(const std::string& word, decltype(Known::set) set, const std::string& expected) {
    return known.emplace(word, Known{set, expected, sizeof(T), alignof(T)}).first->second;
  }

  // What stands between separators, without spaces around it.
  static std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    for (size_t at = 0, end; at < text.size(); at = end + 1) {
      end = std::min(text.find(separator, at), text.size());
      size_t first = text.find_first_not_of(' ', at), last = text.find_last_not_of(' ', end - 1);
      if (first < end) parts.push_back(text.substr(first, last + 1 - first));
    }
    return parts;
  }

  static PyObject* interned(const std::string& name) { return PyUnicode_InternFromString(name.c_str()); }
  static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }
};

inline const sparing::Kernels* chosen = &sparing::portable;

// A kernel of the table as a function of the module. Where there is one for each type, `bfloat16` says which.
template <auto kernel>
class Function {
  template <class Result, class S>
  static S struct_of(Result (*sparing::Kernels::*)(sparing::Type, const S&));
  template <class Result, class S>
  static S struct_of(Result (*sparing::Kernels::*)(const S&));

  using S = decltype(struct_of(kernel));
  static constexpr bool is_typed = std::is_invocable_v<decltype(chosen->*kernel), sparing::Type, const S&>;

  struct Call {
    S fields;
    bool bfloat16;
  };

  static inline Call defaults{};
  static inline Structure structure;
  static inline PyMethodDef method;

  static bool read(Reading& reading, Call& call, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    if (positional) return reading.fail("%s takes its fields by name");
    Setter setter(reading, structure, reinterpret_cast<char*>(&call));
    for (Py_ssize_t i = 0, count = names ? NB_TUPLE_GET_SIZE(names) : 0; i < count; ++i)
      if (!setter.set(NB_TUPLE_GET_ITEM(names, i), values[i])) return false;
    if (!setter.has_all()) return false;
    if (call.fields.threads == 0) call.fields.threads = nb::cast<int>(nb::handle(torch.get_num_threads)());
    return true;
  }

  static auto run(const Call& call) {
    nb::gil_scoped_release free;
    if constexpr (is_typed)
      return (chosen->*kernel)(call.bfloat16 ? sparing::Type::bfloat16 : sparing::Type::float32, call.fields);
    else
      return (chosen->*kernel)(call.fields);
  }

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    try {
      Call call;
      Reading reading{method.ml_name};
      if (!read(reading, call, values, positional, names)) return nullptr;
      if constexpr (std::is_same_v<decltype(run(call)), bool>) return PyBool_FromLong(run(call));
      run(call);
      Py_RETURN_NONE;
    } catch (const std::bad_alloc&) {
      return PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
  }

 public:
  static void add_to(nb::module_& m, const char* name, const Types& types) {
    structure = types.describe(&defaults.fields);
    if constexpr (is_typed) types.append(structure, "bfloat16", "bool", true);
    structure.size = sizeof(Call);
    auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call));
    method = {name, function, METH_FASTCALL | METH_KEYWORDS, S::fields};
    m.attr(name) = nb::steal(PyCFunction_New(&method, nullptr));
  }
};

}  // namespace binding
